"""The DFlash draft: a small pre-norm decoder that denoises blocks over the target's features.

It has no embedding and no head of its own; both are the target's and frozen. Source: the `dflash` package's
DFlashDraftModel and docs/dflash.md#network; every layer is non-causal and unwindowed.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from pipeline.model.dflash.config import DFlashConfig
from pipeline.model.dflash.context import DraftContext, LayerContext
from pipeline.model.dflash.model import DraftModel
from pipeline.model.dflash.weights import DFlashLayerWeights, GatherWeights, no_gather
from pipeline.model.layers import attention, kv_pages
from pipeline.model.layers.kv_pages import PagedCache
from pipeline.model.layers.linear import linear, linear_over_shards, rms_norm
from pipeline.model.layers.rope import angles, rotate
from pipeline.model.parallel.execution import DEFAULT_EXECUTION, Execution
from pipeline.model.parallel.shards import UNSHARDED, Shards


def context(
    draft: DraftModel,
    features: Float[Array, "B T LD"],
    positions: Int[Array, "B T"],
    shards: Shards = UNSHARDED,
    gather: GatherWeights = no_gather,
) -> DraftContext:
    """Returns keys and values [B, T, G, H] of every layer for the features of T tokens at their absolute positions.

    `gather` is as in `denoise_blocks`.
    """
    config, weights = draft.config, gather(draft.weights)
    features = features.astype(weights.norm.dtype)
    if shards.is_split:  # a shard holds a part of the matrix's inputs
        local = config.feature_size // shards.model
        features = jax.lax.dynamic_slice_in_dim(features, shards.over().offset(local), local, axis=-1)
    fused = rms_norm(
        linear_over_shards(features, weights.fuse, shards=shards), weights.context_norm, config.rms_norm_eps
    )
    cos_sin = angles(config.rope, config.head_dim, positions)
    layers = [gather(layer) for layer in weights.layers]
    return DraftContext(tuple(LayerContext(*_keys_values(fused, layer, config, cos_sin)) for layer in layers))


def denoise(
    draft: DraftModel,
    embeddings: Float[Array, "B K D"],
    start: Int[Array, " B"],
    cache: PagedCache,
    table: Int[Array, "B M"],
    execution: Execution = DEFAULT_EXECUTION,
) -> Float[Array, "B K D"]:
    """Returns the final hidden states [B, K, D] of one block per row, whose anchor is at position `start`.

    The block sees the context before it, in the pages of `table`. `embeddings` are the target's for [anchor, mask,
    ...]; the target's head turns the result into logits, and block position k predicts the token at `start` + k.
    """

    def attend(index: int, queries: Array, keys: Array, values: Array) -> Array:
        before = attention.over_cache(queries, cache.layers[index], table, start, None, execution=execution)
        return attention.union([before, attention.over_own(queries, keys, values, causal=False)])

    positions = start[:, None] + jnp.arange(embeddings.shape[1])
    return _layers(draft, embeddings, positions, attend, execution.shards)


def denoise_blocks(
    draft: DraftModel,
    embeddings: Float[Array, "B A K D"],
    positions: Int[Array, "B A K"],
    context: DraftContext,
    visible: Bool[Array, "B A T"],
    *,
    remat: bool = False,
    gather: GatherWeights = no_gather,
    num_devices: int = 1,
) -> Float[Array, "B A K D"]:
    """Returns the final hidden states [B, A, K, D] of A blocks per sequence, each over the context `visible` to it.

    Training calls this, where serving calls `denoise`.

    With `remat` a layer's inner values are computed again in the backward pass instead of being stored. `gather` turns
    the sharded weights of a layer (or of the draft without its layers) into those that are computed with, and again in
    the backward pass with `remat`. `num_devices` is the number of devices that share the scores of attention.
    """

    def attend(index: int, queries: Array, keys: Array, values: Array) -> Array:
        cached = context.layers[index]
        return attention.block_attention(
            queries, cached.keys, cached.values, visible, keys, values, num_devices=num_devices
        )

    return _layers(draft, embeddings, positions, attend, UNSHARDED, remat=remat, gather=gather)


def _layers(
    draft: DraftModel,
    embeddings: Float[Array, "*batch K D"],
    positions: Int[Array, "*batch K"],
    attend: Callable[[int, Array, Array, Array], Array],
    shards: Shards,
    *,
    remat: bool = False,
    gather: GatherWeights = no_gather,
) -> Float[Array, "*batch K D"]:
    """Runs the decoder layers; `attend` takes a layer's index, queries, keys and values [*batch, K, heads, H]."""
    config, weights = draft.config, draft.weights
    cos_sin = angles(config.rope, config.head_dim, positions)
    hidden = embeddings.astype(weights.norm.dtype)

    def run(index: int, layer: DFlashLayerWeights, hidden: Float[Array, "*batch K D"]) -> Float[Array, "*batch K D"]:
        layer = gather(layer)
        normed = rms_norm(hidden, layer.input_norm, config.rms_norm_eps)
        queries = linear(normed, layer.query, layer.query_bias)
        queries = queries.reshape(*normed.shape[:-1], -1, config.head_dim)  # on a shard: its heads
        queries = rotate(rms_norm(queries, layer.query_norm, config.rms_norm_eps), *cos_sin)
        keys, values = _keys_values(normed, layer, config, cos_sin)
        attended = attend(index, queries, keys, values).astype(hidden.dtype).reshape(*normed.shape[:-1], -1)
        hidden = hidden + linear_over_shards(attended, layer.output, layer.output_bias, shards)
        normed = rms_norm(hidden, layer.mlp_norm, config.rms_norm_eps)
        inner = jax.nn.silu(linear(normed, layer.gate)) * linear(normed, layer.up)
        return hidden + linear_over_shards(inner, layer.down, shards=shards)

    for index, layer in enumerate(weights.layers):
        step = functools.partial(run, index)
        hidden = (jax.checkpoint(step) if remat else step)(layer, hidden)
    return rms_norm(hidden, weights.norm, config.rms_norm_eps)


def empty_cache(config: DFlashConfig, num_pages: int, page_size: int, dtype: DTypeLike) -> PagedCache:
    """Returns an empty context cache of pages, which have the positions of the target's `PageTables.whole`."""
    layer = functools.partial(kv_pages.empty, num_pages, config.num_key_value_heads, page_size, config.head_dim, dtype)
    return PagedCache(tuple(layer() for _ in range(config.num_hidden_layers)))


def extend(
    cache: PagedCache,
    new: DraftContext,
    table: Int[Array, "B M"],
    start: Int[Array, " B"],
    num_tokens: Int[Array, " B"] | None = None,
    *,
    execution: Execution = DEFAULT_EXECUTION,
) -> PagedCache:
    """Appends the context of T tokens of each row, the first at position `start`; arguments as in `kv_pages.write`."""
    return PagedCache(
        tuple(
            kv_pages.write(layer, part.keys, part.values, table, start, num_tokens, execution=execution)
            for layer, part in zip(cache.layers, new.layers, strict=True)
        )
    )


def _keys_values(
    inputs: Float[Array, "*batch D"], layer: DFlashLayerWeights, config: DFlashConfig, cos_sin: tuple[Array, Array]
) -> tuple[Float[Array, "*batch G H"], Float[Array, "*batch G H"]]:
    split = (*inputs.shape[:-1], -1, config.head_dim)
    keys = rms_norm(linear(inputs, layer.key, layer.key_bias).reshape(split), layer.key_norm, config.rms_norm_eps)
    return rotate(keys, *cos_sin), linear(inputs, layer.value, layer.value_bias).reshape(split)
