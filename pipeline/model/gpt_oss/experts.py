"""GPT-OSS's mixture of experts: router, clamped SwiGLU, and the ways to run the experts.

An expert is three matrices, gate, up and down, of F rows and D columns. A model whose tokens use a quarter of the
experts or more holds them as one fused network (`FusedExpertWeights`) and runs them all; otherwise few tokens go
through the experts that they hit one by one, and many are grouped by expert.
"""

from collections.abc import Callable
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

ExpertMatrix = Float[Array, "E F D"] | Packed


@pytree_dataclass()
class ExpertsWeights:
    """Holds the router and the single experts of one layer.

    When packed, `gate` and `up` are [E, D, F], packed along D, and `down` is [E, F, D], packed along F: each along the
    axis that is summed, so that a scale belongs to a column. D and F may be padded with zeros, which add nothing.
    """

    router: Matrix
    router_bias: Float[Array, " E"]
    gate: ExpertMatrix
    gate_bias: Float[Array, "E F"]
    up: ExpertMatrix
    up_bias: Float[Array, "E F"]
    down: ExpertMatrix
    down_bias: Float[Array, "E D"]


@pytree_dataclass()
class FusedExpertWeights:
    """Holds the router and the experts of one layer, with the rows of all experts end to end."""

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
    """Returns shares, float32, and indices [M, k] of each token's best experts: a softmax over their logits alone."""
    logits = product(inputs, weights.router) + weights.router_bias  # in float32: bfloat16 logits would tie more often
    best, indices = jax.lax.top_k(logits, experts_per_token)
    return jax.nn.softmax(best, axis=-1), indices


def clamped_swiglu(
    gate: Float[Array, "*batch F"], up: Float[Array, "*batch F"], limit: float
) -> Float[Array, "*batch F"]:
    """Returns (up + 1) * gate * sigmoid(1.702 * gate), with gate clamped from above and up from both sides."""
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
    """Returns the sum [M, D] of each token's experts by their shares, in the precision of the inputs."""
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
    """Runs every token through every expert, those not chosen with share zero.

    Returns this shard's part of the sum, float32 [M, D].
    """
    num_experts, local = weights.router_bias.shape[0], weights.gate_bias.shape[0]
    share = share_of_experts(shares, indices, 0, num_experts)
    row_share = jnp.repeat(share, local * shards.model // num_experts, axis=1)  # of every row of every expert
    if shards.is_split:
        row_share = jax.lax.dynamic_slice_in_dim(row_share, shards.over().offset(local), local, axis=1)
    hidden = clamped_swiglu(
        product(inputs, weights.gate) + weights.gate_bias, product(inputs, weights.up) + weights.up_bias, limit
    )
    outputs = product((hidden * row_share).astype(inputs.dtype), weights.down)
    return outputs + shards.on_first_shard(MODEL, einsum("me,ed->md", share.astype(inputs.dtype), weights.down_bias))


def share_of_experts(
    shares: Float[Array, "M k"], indices: Int[Array, "M k"], first: Int[Array, ""] | int, num_experts: int
) -> Float[Array, "M e"]:
    """Returns each token's shares [M, num_experts] of the experts from `first` on, 0 of those it did not choose."""
    chosen = indices[..., None] == first + jnp.arange(num_experts)
    return jnp.where(chosen, shares[..., None], 0).sum(axis=1)


class Hits(NamedTuple):
    """Holds the experts of this shard that any token chose: the first `num_hit` of `experts`."""

    experts: Int[Array, " hits"]
    num_hit: Int[Array, ""]


def hits(indices: Int[Array, "M k"], first: Int[Array, ""] | int, num_experts: int) -> Hits:
    """Returns each expert that is hit once, in ascending order; elements behind the last one repeat it."""
    is_hit = (indices[..., None] == first + jnp.arange(num_experts)).any(axis=(0, 1))
    size = min(num_experts, indices.size)
    order = jnp.argsort(~is_hit, stable=True)[:size].astype(jnp.int32)
    num_hit = is_hit.sum().astype(jnp.int32)
    last = order[jnp.maximum(num_hit - 1, 0)]
    return Hits(experts=jnp.where(jnp.arange(size) < num_hit, order, last), num_hit=num_hit)


def per_expert(
    inputs: Float[Array, "M D"],
    weights: ExpertsWeights,
    shares: Float[Array, "M k"],
    indices: Int[Array, "M k"],
    limit: float,
    execution: Execution = DEFAULT_EXECUTION,
) -> Float[Array, "M D"]:
    """Runs few tokens, all of them through each expert that any of them hits; only these experts are read, and once.

    Returns this shard's part of the sum, float32 [M, D].
    """
    num_experts = weights.down_bias.shape[0]
    first = execution.shards.over(EXPERT).offset(num_experts)
    hit, share = hits(indices, first, num_experts), share_of_experts(shares, indices, first, num_experts)
    down_bias = execution.shards.on_first_shard(TENSOR, weights.down_bias)
    packed = isinstance(weights.gate, Packed)
    if execution.backend in PALLAS_BACKENDS:
        kernel: Callable[..., Array] = experts_pallas.packed_experts if packed else experts_pallas.experts
        matrices = (weights.gate, weights.gate_bias, weights.up, weights.up_bias, weights.down, down_bias)
        interpret = execution.backend is KernelBackend.pallas_interpreted
        return kernel(inputs, *hit, share, *matrices, limit=limit, interpret=interpret)
    into = "md,df->mf" if packed else "md,fd->mf"

    def add(index: Int[Array, ""], so_far: Float[Array, "M D"]) -> Float[Array, "M D"]:
        expert = hit.experts[index]
        matrices = jax.tree.map(lambda array: array[expert][None], _matrices(weights))
        gate, up, down = (matrix[0] for matrix in _unpacked(matrices, inputs))
        token_share = share[:, expert][:, None]
        hidden = clamped_swiglu(
            einsum(into, inputs, gate) + weights.gate_bias[expert],
            einsum(into, inputs, up) + weights.up_bias[expert],
            limit,
        )
        outputs = einsum("mf,fd->md", (hidden * token_share).astype(inputs.dtype), down)
        return so_far + outputs + token_share * down_bias[expert]

    return jax.lax.fori_loop(0, hit.num_hit, add, jnp.zeros(inputs.shape, jnp.float32))


def grouped_gemm(
    inputs: Float[Array, "M D"],
    weights: ExpertsWeights,
    shares: Float[Array, "M k"],
    indices: Int[Array, "M k"],
    limit: float,
    execution: Execution = DEFAULT_EXECUTION,
) -> Float[Array, "M D"]:
    """Runs many tokens: sorts them by expert and multiplies group by group.

    A shard's own experts come first; tokens of other experts add zero. Returns this shard's part of the sum, float32
    [M, D].
    """
    num_tokens, per_token = indices.shape
    num_local, num_experts = weights.down_bias.shape[0], weights.router_bias.shape[0]
    flat = (indices.reshape(-1) - execution.shards.over(EXPERT).offset(num_local)) % num_experts
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.bincount(flat, length=num_experts).astype(jnp.int32)[:num_local]
    expert = flat[order]
    is_local = (expert < num_local)[:, None]
    expert = jnp.minimum(expert, num_local - 1)
    gate, up, down = _unpacked(_matrices(weights), inputs)
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
    """Returns the first sizes[0] rows times the first matrix, and so on, in float32.

    Rows past all groups may come out as anything.
    """
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


def _matrices(weights: ExpertsWeights) -> tuple[ExpertMatrix, ExpertMatrix, ExpertMatrix]:
    return weights.gate, weights.up, weights.down


def _unpacked(
    matrices: tuple[ExpertMatrix, ExpertMatrix, ExpertMatrix], inputs: Float[Array, "M D"]
) -> tuple[Array, Array, Float[Array, "E F D"]]:
    """Returns the matrices as floats of the inputs' precision: [E, F, D], but packed gate and up come as [E, D, F]."""
    gate, up, down = (
        mxfp4.unpack(matrix, inputs.dtype) if isinstance(matrix, Packed) else matrix for matrix in matrices
    )
    if isinstance(matrices[0], Packed):  # without the padding of D
        gate, up = gate[:, : inputs.shape[-1]], up[:, : inputs.shape[-1]]
    return gate, up, down
