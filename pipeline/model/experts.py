"""GPT-OSS's mixture of experts: router, clamped SwiGLU, and three ways to run the experts."""

import dataclasses
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pipeline.model.linear import einsum, linear

SWIGLU_ALPHA = 1.702


@no_type_check  # JAX rebuilds it around shapes, masks and gradients too
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertsWeights:
    """Router and experts of one layer. Index 0 of `gate_up`'s pair axis is the gate, 1 is up."""

    router: Float[Array, "D E"]
    router_bias: Float[Array, " E"]
    gate_up: Float[Array, "E D 2 F"]
    gate_up_bias: Float[Array, "E 2 F"]
    down: Float[Array, "E F D"]
    down_bias: Float[Array, "E D"]


def route(
    inputs: Float[Array, "M D"], weights: ExpertsWeights, experts_per_token: int
) -> tuple[Float[Array, "M k"], Int[Array, "M k"]]:
    """The best experts of each token and their shares: softmax over the chosen logits only."""
    logits = linear(inputs, weights.router, weights.router_bias)
    best, indices = jax.lax.top_k(logits, experts_per_token)
    return jax.nn.softmax(best.astype(jnp.float32), axis=-1).astype(inputs.dtype), indices  # exp in float32


def clamped_swiglu(
    gate: Float[Array, "*batch F"], up: Float[Array, "*batch F"], limit: float
) -> Float[Array, "*batch F"]:
    """(up + 1) * gate * sigmoid(1.702 * gate), gate clamped from above and up from both sides."""
    gate = jnp.minimum(gate, limit)
    up = jnp.clip(up, -limit, limit)
    return (up + 1) * gate * jax.nn.sigmoid(SWIGLU_ALPHA * gate)


def mixture(
    inputs: Float[Array, "M D"], weights: ExpertsWeights, experts_per_token: int, limit: float
) -> Float[Array, "M D"]:
    """Each token through its experts, summed by their shares.

    The three ways give the same sums and differ in what they read and multiply: few tokens gather their
    experts, many are grouped by expert, and where a token uses a quarter of the experts or more, running
    them all costs less than either.
    """
    shares, indices = route(inputs, weights, experts_per_token)
    num_experts = weights.router.shape[1]
    if num_experts <= 4 * experts_per_token:
        return dense(inputs, weights, shares, indices, limit)
    if inputs.shape[0] * experts_per_token <= num_experts // 2:
        return gathered(inputs, weights, shares, indices, limit)
    return grouped(inputs, weights, shares, indices, limit)


def gathered(
    inputs: Float[Array, "M D"],
    weights: ExpertsWeights,
    shares: Float[Array, "M k"],
    indices: Int[Array, "M k"],
    limit: float,
) -> Float[Array, "M D"]:
    """Few tokens: read the experts that are hit and no others."""
    hidden = einsum("md,mkdpf->mkpf", inputs, weights.gate_up[indices]) + weights.gate_up_bias[indices]
    hidden = clamped_swiglu(hidden[:, :, 0], hidden[:, :, 1], limit)
    outputs = einsum("mkf,mkfd->mkd", hidden, weights.down[indices]) + weights.down_bias[indices]
    return einsum("mkd,mk->md", outputs, shares)


def grouped(
    inputs: Float[Array, "M D"],
    weights: ExpertsWeights,
    shares: Float[Array, "M k"],
    indices: Int[Array, "M k"],
    limit: float,
) -> Float[Array, "M D"]:
    """Many tokens: sort them by expert and multiply group by group (`jax.lax.ragged_dot`)."""
    num_tokens, per_token = indices.shape
    num_experts, width = weights.router.shape[1], inputs.shape[1]
    flat = indices.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.bincount(flat, length=num_experts).astype(jnp.int32)
    expert = flat[order]
    exact = inputs.dtype == jnp.float32
    precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
    rows = inputs[order // per_token]
    gate_up = weights.gate_up.reshape(num_experts, width, -1)
    hidden = jax.lax.ragged_dot(rows, gate_up, sizes, precision=precision).reshape(len(flat), 2, -1)
    hidden += weights.gate_up_bias[expert]
    hidden = clamped_swiglu(hidden[:, 0], hidden[:, 1], limit)
    outputs = jax.lax.ragged_dot(hidden, weights.down, sizes, precision=precision) + weights.down_bias[expert]
    restored = outputs[jnp.argsort(order, stable=True)].reshape(num_tokens, per_token, width)
    return einsum("mkd,mk->md", restored, shares)


def dense(
    inputs: Float[Array, "M D"],
    weights: ExpertsWeights,
    shares: Float[Array, "M k"],
    indices: Int[Array, "M k"],
    limit: float,
) -> Float[Array, "M D"]:
    """Every token through every expert, those not chosen with share zero."""
    num_tokens, num_experts = inputs.shape[0], weights.router.shape[1]
    share = jnp.zeros((num_tokens, num_experts), shares.dtype).at[jnp.arange(num_tokens)[:, None], indices].set(shares)
    # one product per expert, batched: leaving the experts to a free axis makes XLA:CPU move all weights first
    rows = jnp.broadcast_to(inputs, (num_experts, *inputs.shape))
    hidden = einsum("emd,edpf->empf", rows, weights.gate_up) + weights.gate_up_bias[:, None]
    hidden = clamped_swiglu(hidden[:, :, 0], hidden[:, :, 1], limit) * share.T[..., None]
    return einsum("emf,efd->emd", hidden, weights.down).sum(0) + einsum("me,ed->md", share, weights.down_bias)
