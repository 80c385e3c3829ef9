"""GPT-OSS's mixture of experts: router, clamped SwiGLU, and the ways to run the experts.

An expert is three matrices, gate, up and down, of F rows and D columns. A model whose tokens use a quarter of the
experts or more holds them as one wide network (`WideWeights`) and runs them all; else few tokens read the experts
that they hit, many are grouped by expert.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pipeline.model.gpt_oss import experts_pallas
from pipeline.model.layers import mxfp4
from pipeline.model.layers.linear import Matrix, einsum, product
from pipeline.model.layers.mxfp4 import Packed
from pipeline.model.layers.pytree import pytree_dataclass
from pipeline.model.parallel.execution import DEFAULT_EXECUTION, PALLAS_BACKENDS, Execution, KernelBackend
from pipeline.model.parallel.shards import EXPERT, MODEL, TENSOR, UNSHARDED, Shards

SWIGLU_ALPHA = 1.702


@pytree_dataclass()
class ExpertsWeights:
    """Router and experts of one layer, apart from each other.

    Packed, `gate` and `up` are [E, D, F], packed along D, and `down` is [E, F, D], packed along F: each along what is
    summed, so that a scale belongs to a column. D and F may be padded with zeros, which yield nothing.
    """

    router: Matrix
    router_bias: Float[Array, " E"]
    gate: Float[Array, "E F D"] | Packed
    gate_bias: Float[Array, "E F"]
    up: Float[Array, "E F D"] | Packed
    up_bias: Float[Array, "E F"]
    down: Float[Array, "E F D"] | Packed
    down_bias: Float[Array, "E D"]


@pytree_dataclass()
class FusedExpertWeights:
    """Router and experts of one layer, the experts' rows end to end."""

    router: Matrix
    router_bias: Float[Array, " E"]
    gate: Matrix  # D -> E F
    gate_bias: Float[Array, " EF"]
    up: Matrix  # D -> E F
    up_bias: Float[Array, " EF"]
    down: Matrix  # E F -> D
    down_bias: Float[Array, "E D"]


def route(
    inputs: Float[Array, "M D"], weights: ExpertsWeights | FusedExpertWeights, experts_per_token: int
) -> tuple[Float[Array, "M k"], Int[Array, "M k"]]:
    """The best experts of each token and their shares: softmax over the chosen logits only, float32."""
    logits = product(inputs, weights.router) + weights.router_bias  # rounded to bfloat16, they would tie more often
    best, indices = jax.lax.top_k(logits, experts_per_token)
    return jax.nn.softmax(best, axis=-1), indices


def clamped_swiglu(
    gate: Float[Array, "*batch F"], up: Float[Array, "*batch F"], limit: float
) -> Float[Array, "*batch F"]:
    """(up + 1) * gate * sigmoid(1.702 * gate), gate clamped from above and up from both sides."""
    gate = jnp.minimum(gate, limit)
    up = jnp.clip(up, -limit, limit)
    return (up + 1) * gate * jax.nn.sigmoid(SWIGLU_ALPHA * gate)


def mixture(
    inputs: Float[Array, "M D"],
    weights: ExpertsWeights | FusedExpertWeights,
    experts_per_token: int,
    limit: float,
    execution: Execution = DEFAULT_EXECUTION,
) -> Float[Array, "M D"]:
    """Each token through its experts, summed by their shares."""
    shares, indices = route(inputs, weights, experts_per_token)
    if isinstance(weights, FusedExpertWeights):
        outputs = fused_experts(inputs, weights, shares, indices, limit, execution.shards)
    elif inputs.shape[0] <= execution.max_per_expert_tokens:
        outputs = per_expert(inputs, weights, shares, indices, limit, execution)
    else:
        outputs = grouped_gemm(inputs, weights, shares, indices, limit, execution)
    return execution.shards.sum(outputs).astype(inputs.dtype)


def fused_experts(
    inputs: Float[Array, "M D"],
    weights: FusedExpertWeights,
    shares: Float[Array, "M k"],
    indices: Int[Array, "M k"],
    limit: float,
    shards: Shards = UNSHARDED,
) -> Float[Array, "M D"]:
    """Every token through every expert, those not chosen with share zero. Returns this shard's part of the sum."""
    num_experts, local = weights.router_bias.shape[0], weights.gate_bias.shape[0]
    share = share_of_experts(shares, indices, 0, num_experts)
    each = jnp.repeat(share, local * shards.model // num_experts, axis=1)  # of every row of every expert
    if shards.is_split:
        each = jax.lax.dynamic_slice_in_dim(each, shards.over().offset(local), local, axis=1)
    hidden = clamped_swiglu(
        product(inputs, weights.gate) + weights.gate_bias, product(inputs, weights.up) + weights.up_bias, limit
    )
    outputs = product((hidden * each).astype(inputs.dtype), weights.down)
    return outputs + shards.on_first_shard(MODEL, einsum("me,ed->md", share.astype(inputs.dtype), weights.down_bias))


def share_of_experts(
    shares: Float[Array, "M k"], indices: Int[Array, "M k"], first: Int[Array, ""] | int, num_experts: int
) -> Float[Array, "M e"]:
    """What each token takes of the experts first .. first + num_experts - 1; 0 of those it did not choose."""
    chosen = indices[..., None] == first + jnp.arange(num_experts)
    return jnp.where(chosen, shares[..., None], 0).sum(axis=1)


class Hits(NamedTuple):
    """The experts of this shard that some token chose: the first `count` of `experts`."""

    experts: Int[Array, " slots"]
    count: Int[Array, ""]


def hits(indices: Int[Array, "M k"], first: Int[Array, ""] | int, num_experts: int) -> Hits:
    """Each expert that is hit once, in ascending order; places behind the last one repeat it."""
    is_hit = (indices[..., None] == first + jnp.arange(num_experts)).any(axis=(0, 1))
    slots = min(num_experts, indices.size)
    order = jnp.argsort(~is_hit, stable=True)[:slots].astype(jnp.int32)
    count = is_hit.sum().astype(jnp.int32)
    taken = jnp.arange(slots) < count
    return Hits(experts=jnp.where(taken, order, order[jnp.maximum(count - 1, 0)]), count=count)


def per_expert(
    inputs: Float[Array, "M D"],
    weights: ExpertsWeights,
    shares: Float[Array, "M k"],
    indices: Int[Array, "M k"],
    limit: float,
    execution: Execution = DEFAULT_EXECUTION,
) -> Float[Array, "M D"]:
    """Few tokens: all of them through each expert that is hit, which is read once; no other expert is read.

    Returns this shard's part of the sum, in float32.
    """
    num_experts = weights.down_bias.shape[0]
    first = execution.shards.over(EXPERT).offset(num_experts)
    found, share = hits(indices, first, num_experts), share_of_experts(shares, indices, first, num_experts)
    down_bias = execution.shards.on_first_shard(TENSOR, weights.down_bias)
    packed = isinstance(weights.gate, Packed)
    if execution.backend in PALLAS_BACKENDS:
        kernel = experts_pallas.packed_experts if packed else experts_pallas.experts
        matrices = (weights.gate, weights.gate_bias, weights.up, weights.up_bias, weights.down, down_bias)
        interpret = execution.backend is KernelBackend.pallas_interpreted
        return kernel(inputs, *found, share, *matrices, limit=limit, interpret=interpret)
    into = "md,df->mf" if packed else "md,fd->mf"

    def add(slot: Int[Array, ""], so_far: Float[Array, "M D"]) -> Float[Array, "M D"]:
        expert = found.experts[slot]
        one = jax.tree.map(lambda array: array[expert][None], _matrices(weights))
        gate, up, down = (matrix[0] for matrix in _unpacked(*one, inputs))
        taken = share[:, expert][:, None]
        hidden = clamped_swiglu(
            einsum(into, inputs, gate) + weights.gate_bias[expert],
            einsum(into, inputs, up) + weights.up_bias[expert],
            limit,
        )
        outputs = einsum("mf,fd->md", (hidden * taken).astype(inputs.dtype), down)
        return so_far + outputs + taken * down_bias[expert]

    return jax.lax.fori_loop(0, found.count, add, jnp.zeros(inputs.shape, jnp.float32))


def grouped_gemm(
    inputs: Float[Array, "M D"],
    weights: ExpertsWeights,
    shares: Float[Array, "M k"],
    indices: Int[Array, "M k"],
    limit: float,
    execution: Execution = DEFAULT_EXECUTION,
) -> Float[Array, "M D"]:
    """Many tokens: sort them by expert and multiply group by group.

    A shard's own experts come first, and what is behind them is zero. Returns this shard's part of the sum.
    """
    num_tokens, per_token = indices.shape
    num_local, num_experts = weights.down_bias.shape[0], weights.router_bias.shape[0]
    flat = (indices.reshape(-1) - execution.shards.over(EXPERT).offset(num_local)) % num_experts
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.bincount(flat, length=num_experts).astype(jnp.int32)[:num_local]
    expert = flat[order]
    is_local = (expert < num_local)[:, None]
    expert = jnp.minimum(expert, num_local - 1)
    gate, up, down = _unpacked(*_matrices(weights), inputs)
    rows = inputs[order // per_token]
    transposed = not isinstance(weights.gate, Packed)
    hidden = clamped_swiglu(
        grouped_product(rows, gate, sizes, execution.backend, transposed=transposed) + weights.gate_bias[expert],
        grouped_product(rows, up, sizes, execution.backend, transposed=transposed) + weights.up_bias[expert],
        limit,
    ).astype(inputs.dtype)
    down_bias = execution.shards.on_first_shard(TENSOR, weights.down_bias)
    outputs = grouped_product(hidden, down, sizes, execution.backend) + down_bias[expert]
    outputs = jnp.where(is_local, outputs, 0)
    restored = outputs[jnp.argsort(order, stable=True)].reshape(num_tokens, per_token, -1)
    return einsum("mkd,mk->md", restored, shares)


def grouped_product(
    rows: Float[Array, "M K"],
    matrices: Float[Array, "E K N"] | Float[Array, "E N K"],
    sizes: Int[Array, " E"],
    backend: KernelBackend,
    *,
    transposed: bool = False,
) -> Float[Array, "M N"]:
    """The first sizes[0] rows times the first matrix, and so on, in float32; rows past all groups give anything."""
    if backend in PALLAS_BACKENDS:
        interpret = backend is KernelBackend.pallas_interpreted
        return experts_pallas.ragged_product(rows, matrices, sizes, transposed=transposed, interpret=interpret)
    contracted = ((1,), (2 if transposed else 1,))
    numbers = jax.lax.RaggedDotDimensionNumbers((contracted, ((), ())), [0], [0])
    exact = rows.dtype == jnp.float32
    precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
    return jax.lax.ragged_dot_general(
        rows, matrices, sizes, numbers, precision=precision, preferred_element_type=jnp.float32
    )


def _matrices(weights: ExpertsWeights) -> tuple[Array | Packed, Array | Packed, Array | Packed]:
    return weights.gate, weights.up, weights.down


def _unpacked(
    gate: Array | Packed, up: Array | Packed, down: Array | Packed, inputs: Float[Array, "M D"]
) -> tuple[Array, Array, Float[Array, "E F D"]]:
    """The matrices as floats of the inputs' precision: [E, F, D], but packed gate and up come as [E, D, F]."""
    if not isinstance(gate, Packed):
        return gate, up, down
    gate, up = (mxfp4.unpack(one, inputs.dtype)[:, : inputs.shape[-1]] for one in (gate, up))
    return gate, up, mxfp4.unpack(down, inputs.dtype)
