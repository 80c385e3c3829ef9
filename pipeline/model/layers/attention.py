"""Grouped-query attention in parts: over the cache, over a call's own tokens, and their exact union.

A softmax over a union of keys follows from the softmaxes over its parts and the logarithms of their sums
(log-sum-exp). GPT-OSS's learned sink is one more part, without values. So each part is computed where its keys are, by
the kernel that suits it.
"""

import functools
import math
import operator
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pipeline.model.layers import attention_kernels, kv_pages, page_kernels
from pipeline.model.layers.kv_pages import PagedLayer
from pipeline.model.layers.linear import einsum
from pipeline.model.layers.page_kernels import MASKED
from pipeline.model.parallel.execution import DEFAULT_EXECUTION, PALLAS_BACKENDS, Execution, KernelBackend

CACHE_CHUNK = 128  # positions of a row's pages read at a time, as far as any row is filled; more of long rows
MAX_CHUNKS = 16  # of a row
MAX_SCORES = 2**27  # scores held at once


class Part(NamedTuple):
    """Holds attention over a part of the keys: softmaxed values, and the logarithm of the softmax's sum."""

    values: Float[Array, "B T N H"]
    log_sum: Float[Array, "B T N"]


def union(parts: Sequence[Part], sinks: Float[Array, " N"] | None = None) -> Float[Array, "B T N H"]:
    """Returns attention over the keys of all parts and over a sink per query head, float32 [B, T, N, H].

    Source: transformers GptOssAttention (the sink joins the softmax and is dropped before the values).
    """
    peak = jnp.stack([part.log_sum for part in parts]).max(axis=0)
    if sinks is not None:
        peak = jnp.maximum(peak, sinks.astype(jnp.float32))  # joins a float32 softmax
    peak = jax.lax.stop_gradient(peak)
    weights = [jnp.exp(part.log_sum - peak) for part in parts]
    total = _sum(weights)
    if sinks is not None:
        total += jnp.exp(sinks.astype(jnp.float32) - peak)
    shares = [(weight / total)[..., None] for weight in weights]
    return _sum(part.values * share for part, share in zip(parts, shares, strict=True))


def over_cache(
    queries: Float[Array, "B T N H"],
    layer: PagedLayer,
    table: Int[Array, "B M"],
    start: Int[Array, " B"],
    window: int | None,
    *,
    execution: Execution = DEFAULT_EXECUTION,
) -> Part:
    """Returns the part of T tokens per row, the first at position `start`, over the cached positions before `start`.

    With a `window`, position p sees p - window + 1 .. p. Only pages that a row may see are read: those of the window,
    or all up to the longest row's last one, a few at a time.
    """
    if execution.backend in PALLAS_BACKENDS:
        interpret = execution.backend is KernelBackend.pallas_interpreted
        return Part(*page_kernels.attend(queries, layer.entries, table, start, window, interpret=interpret))
    page_size = layer.entries.shape[2]
    if window is not None:
        count = min(kv_pages.pages_for(window - 1, page_size) + 1, table.shape[1])
        first = jnp.clip((start - window + 1) // page_size, 0, table.shape[1] - count)
        numbers = first[:, None] + jnp.arange(count)
        keys, values = kv_pages.take(layer, jnp.take_along_axis(table, numbers, axis=1))
        positions = (numbers[..., None] * page_size + jnp.arange(page_size)).reshape(len(start), -1)
        near = positions[:, None] > _own_positions(queries, start)[..., None] - window
        return _part(queries, keys, values, (positions < start[:, None])[:, None] & near)
    chunk = _pages_at_once(queries, page_size, table.shape[1])
    table = jnp.pad(table, [(0, 0), (0, -table.shape[1] % chunk)])
    chunk_positions = chunk * page_size

    def add(index: Int[Array, ""], so_far: Part) -> Part:
        keys, values = kv_pages.take(layer, jax.lax.dynamic_slice_in_dim(table, index * chunk, chunk, axis=1))
        visible = index * chunk_positions + jnp.arange(chunk_positions) < start[:, None, None]
        return _joined(so_far, _part(queries, keys, values, visible))

    nothing = Part(jnp.zeros(queries.shape, jnp.float32), jnp.full(queries.shape[:3], MASKED, jnp.float32))
    return jax.lax.fori_loop(0, (start.max() + chunk_positions - 1) // chunk_positions, add, nothing)


def _pages_at_once(queries: Float[Array, "B T N H"], page_size: int, num_pages: int) -> int:
    """Returns how many pages of each row to read at once: not many more than are filled, nor too many scores."""
    positions = max(CACHE_CHUNK, num_pages * page_size // MAX_CHUNKS)
    while math.prod(queries.shape[:3]) * positions > MAX_SCORES and positions > page_size:
        positions //= 2
    return min(max(1, positions // page_size), num_pages)


def over_own(
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B T G H"],
    values: Float[Array, "B T G H"],
    window: int | None = None,
    *,
    causal: bool = True,
    execution: Execution = DEFAULT_EXECUTION,
) -> Part:
    """Returns the part of T tokens per row over each other: each sees itself and those before, or all if not `causal`.

    A kernel computes it where one can. Otherwise long rows are cut into runs of queries, so that no more than
    MAX_SCORES scores are held; with a `window` a run reads its own keys and those of a window before it.
    """
    batch, length, num_heads, _ = queries.shape
    if causal and execution.backend in PALLAS_BACKENDS:
        if attention_kernels.splash_takes(length):
            interpret = execution.backend is KernelBackend.pallas_interpreted
            return Part(*attention_kernels.on_tpu(queries, keys, values, window, interpret=interpret))
    elif causal and execution.backend is KernelBackend.cudnn and length > 1 and queries.dtype == jnp.bfloat16:
        return Part(*attention_kernels.on_gpu(queries, keys, values, window))
    if batch * num_heads * length * length <= MAX_SCORES or not causal:
        return _part(queries, keys, values, _visible(jnp.arange(length), jnp.arange(length), window, causal))
    size = max(64, MAX_SCORES // (batch * num_heads * length))
    num_runs = -(-length // size)
    before = 0 if window is None else window - 1
    padded = [(0, 0), (before, num_runs * size - length), (0, 0), (0, 0)]
    keys, values = jnp.pad(keys, padded), jnp.pad(values, padded)
    queries = jnp.pad(queries, [(0, 0), (0, num_runs * size - length), (0, 0), (0, 0)])

    def run(index: Int[Array, ""]) -> Part:
        part = jax.lax.dynamic_slice_in_dim(queries, index * size, size, axis=1)
        positions = index * size + jnp.arange(size)
        if window is None:
            return _part(part, keys, values, _visible(positions, jnp.arange(keys.shape[1]), None, True))
        near_keys, near_values = (
            jax.lax.dynamic_slice_in_dim(array, index * size, before + size, axis=1) for array in (keys, values)
        )
        near = _visible(positions, index * size - before + jnp.arange(before + size), window, True)
        return _part(part, near_keys, near_values, near)

    runs = jax.lax.map(run, jnp.arange(num_runs))
    return Part(*(jnp.moveaxis(array, 0, 1).reshape(batch, -1, *array.shape[3:])[:, :length] for array in runs))


def _own_positions(queries: Float[Array, "B T N H"], start: Int[Array, " B"]) -> Int[Array, "B T"]:
    return start[:, None] + jnp.arange(queries.shape[1])


def _visible(
    queries: Int[Array, " T"], keys: Int[Array, " S"], window: int | None, causal: bool
) -> Bool[Array, "1 T S"]:
    """Returns which of the positions `keys` the positions `queries` see; a negative one is no key."""
    if not causal:
        return jnp.ones((1, len(queries), len(keys)), bool)
    visible = (keys <= queries[:, None]) & (keys >= 0)
    if window is not None:
        visible &= keys > queries[:, None] - window
    return visible[None]


def _part(
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B S G H"],
    values: Float[Array, "B S G H"],
    visible: Bool[Array, "#B #T S"],
) -> Part:
    """Returns attention of T queries over S keys of each row, of which `visible` are seen."""
    batch, num_queries, num_heads, width = queries.shape
    groups = keys.shape[2]
    per_group = num_heads // groups
    scaled = (queries * width**-0.5).reshape(batch, num_queries, groups, per_group, width)
    # a group's heads and tokens as one axis: two make XLA's product on a CPU half as fast again
    grouped = scaled.transpose(0, 2, 3, 1, 4).reshape(batch, groups, per_group * num_queries, width)
    scores = einsum("bgqh,bsgh->bgqs", grouped, keys).reshape(batch, groups, per_group, num_queries, -1)
    scores = jnp.where(visible[:, None, None], scores, MASKED)
    peak = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.exp(scores - peak)
    total = weights.sum(axis=-1, keepdims=True)
    shares = (weights / total).astype(values.dtype).reshape(batch, groups, per_group * num_queries, -1)
    outputs = einsum("bgqs,bsgh->bgqh", shares, values).reshape(batch, groups, per_group, num_queries, width)
    log_sum = jnp.moveaxis((peak + jnp.log(total))[..., 0], 3, 1)
    return Part(outputs.transpose(0, 3, 1, 2, 4).reshape(queries.shape), log_sum.reshape(queries.shape[:3]))


def _sum(arrays: Iterable[Array]) -> Array:
    return functools.reduce(operator.add, arrays)


def _joined(left: Part, right: Part) -> Part:
    """Returns the part over the keys of two parts."""
    peak = jnp.maximum(left.log_sum, right.log_sum)
    shares = [jnp.exp(part.log_sum - peak) for part in (left, right)]
    total = shares[0] + shares[1]
    values = _sum(part.values * (share / total)[..., None] for part, share in zip((left, right), shares, strict=True))
    return Part(values, peak + jnp.log(total))


def block_attention(
    queries: Float[Array, "B A K N H"],
    context_keys: Float[Array, "B T G H"],
    context_values: Float[Array, "B T G H"],
    visible: Bool[Array, "B A T"],
    block_keys: Float[Array, "B A K G H"],
    block_values: Float[Array, "B A K G H"],
    *,
    num_devices: int = 1,
) -> Float[Array, "B A K N H"]:
    """Returns attention [B, A, K, N, H] of A blocks over their sequence's context and over themselves, both ways.

    Every position of a block sees the same context (`visible`); blocks do not see each other. Many blocks run a few at
    a time and again in the backward pass, so that each of the `num_devices` over which rows and heads are split holds
    no more than MAX_SCORES scores.
    """
    batch, num_blocks, block_size, num_heads, _ = queries.shape
    fitting = num_devices * MAX_SCORES // (batch * num_heads * block_size * context_keys.shape[1])
    if fitting >= num_blocks:
        return _blocks(queries, context_keys, context_values, visible, block_keys, block_values)
    num_parts = -(-num_blocks // max(1, fitting))
    size = -(-num_blocks // num_parts)

    def parts(array: Array) -> Array:
        spare = [(0, 0), (0, num_parts * size - num_blocks)] + [(0, 0)] * (array.ndim - 2)
        return jnp.moveaxis(jnp.pad(array, spare).reshape(batch, num_parts, size, *array.shape[2:]), 1, 0)

    @jax.checkpoint
    def run(part: tuple[Array, Array, Array, Array]) -> Float[Array, "B a K N H"]:
        part_queries, part_visible, part_keys, part_values = part
        return _blocks(part_queries, context_keys, context_values, part_visible, part_keys, part_values)

    outputs = jax.lax.map(run, tuple(map(parts, (queries, visible, block_keys, block_values))))
    return jnp.moveaxis(outputs, 0, 1).reshape(batch, num_parts * size, *queries.shape[2:])[:, :num_blocks]


def _blocks(
    queries: Float[Array, "B A K N H"],
    context_keys: Float[Array, "B T G H"],
    context_values: Float[Array, "B T G H"],
    visible: Bool[Array, "B A T"],
    block_keys: Float[Array, "B A K G H"],
    block_values: Float[Array, "B A K G H"],
) -> Float[Array, "B A K N H"]:
    *lead, num_heads, width = queries.shape
    groups = context_keys.shape[2]
    grouped = (queries * width**-0.5).reshape(*lead, groups, num_heads // groups, width)
    context_scores = einsum("bakgrh,btgh->bgrakt", grouped, context_keys)
    block_scores = einsum("bakgrh,bajgh->bgrakj", grouped, block_keys)
    context_scores = jnp.where(visible[:, None, None, :, None], context_scores, MASKED)
    weights = jax.nn.softmax(jnp.concatenate([context_scores, block_scores], axis=-1), axis=-1)
    weights = weights.astype(block_values.dtype)
    num_context = context_keys.shape[1]
    outputs = einsum("bgrakt,btgh->bakgrh", weights[..., :num_context], context_values)
    outputs += einsum("bgrakj,bajgh->bakgrh", weights[..., num_context:], block_values)
    return outputs.reshape(queries.shape).astype(queries.dtype)
