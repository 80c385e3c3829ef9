"""Grouped-query attention: the target's, with learned sinks, and the draft's, over context and block."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pipeline.model.linear import einsum

MASKED = -1e30  # finite: a row that sees nothing becomes uniform garbage that nobody reads, never nan


def causal_visible(positions: Int[Array, "B T"], num_keys: int, window: int | None) -> Bool[Array, "B T S"]:
    """Which cached positions 0..S-1 each query sees: itself and before, at most `window` of them.

    Position p sees p - window + 1 .. p (transformers keeps W keys, its own included).
    """
    keys = jnp.arange(num_keys)
    visible = keys <= positions[..., None]
    if window is not None:
        visible &= keys > positions[..., None] - window
    return visible


def sink_attention(
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B S G H"],
    values: Float[Array, "B S G H"],
    visible: Bool[Array, "B T S"],
    sinks: Float[Array, " N"],
) -> Float[Array, "B T N H"]:
    """Attention whose softmax has one more, valueless logit per query head, the learned sink.

    Source: transformers GptOssAttention (the sink joins the softmax and is dropped before the values).
    """
    batch, num_queries, num_heads, width = queries.shape
    groups = keys.shape[2]
    grouped = queries.reshape(batch, num_queries, groups, num_heads // groups, width)
    scores = einsum("btgrh,bsgh->bgrts", grouped * width**-0.5, keys).astype(jnp.float32)  # softmax range
    scores = jnp.where(visible[:, None, None], scores, MASKED)
    sink = sinks.astype(jnp.float32).reshape(groups, -1)[None, :, :, None, None]  # joins a float32 softmax
    peak = jax.lax.stop_gradient(jnp.maximum(scores.max(axis=-1, keepdims=True), sink))
    weights = jnp.exp(scores - peak)
    weights = weights / (weights.sum(axis=-1, keepdims=True) + jnp.exp(sink - peak))
    outputs = einsum("bgrts,bsgh->btgrh", weights.astype(values.dtype), values)
    return outputs.reshape(queries.shape)


def block_attention(
    queries: Float[Array, "B A K N H"],
    context_keys: Float[Array, "B T G H"],
    context_values: Float[Array, "B T G H"],
    visible: Bool[Array, "B A T"],
    block_keys: Float[Array, "B A K G H"],
    block_values: Float[Array, "B A K G H"],
) -> Float[Array, "B A K N H"]:
    """Attention of A blocks of K slots over one sequence's context and over their own slots, both ways.

    Every slot of a block sees the same context (`visible`); blocks do not see each other.
    """
    *lead, num_heads, width = queries.shape
    groups = context_keys.shape[2]
    grouped = (queries * width**-0.5).reshape(*lead, groups, num_heads // groups, width)
    context_scores = einsum("bakgrh,btgh->bgrakt", grouped, context_keys).astype(jnp.float32)  # softmax range
    block_scores = einsum("bakgrh,bajgh->bgrakj", grouped, block_keys).astype(jnp.float32)
    context_scores = jnp.where(visible[:, None, None, :, None], context_scores, MASKED)
    weights = jax.nn.softmax(jnp.concatenate([context_scores, block_scores], axis=-1), axis=-1)
    weights = weights.astype(block_values.dtype)
    num_context = context_keys.shape[1]
    outputs = einsum("bgrakt,btgh->bakgrh", weights[..., :num_context], context_values)
    outputs += einsum("bgrakj,bajgh->bakgrh", weights[..., num_context:], block_values)
    return outputs.reshape(queries.shape)
