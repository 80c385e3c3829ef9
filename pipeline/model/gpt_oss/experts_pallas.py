"""Experts on a TPU: one Pallas kernel reads each expert that is hit once and nothing else, MXFP4 or bfloat16.

The grid walks the experts that are hit, however many there are; their indices are known before the kernel starts
(scalar prefetch), so each expert's matrices are copied from HBM while the one before is multiplied. MXFP4 is
unpacked in VMEM, a few blocks of rows at a time. Many tokens go through JAX's own grouped matrix product (megablox).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.megablox import gmm
from jaxtyping import Array, Float, Int

from pipeline.model.layers import mxfp4
from pipeline.model.layers.mxfp4 import Packed
from pipeline.model.layers.tpu_memory import ROW_TILE, VMEM_BYTES, in_hbm

HIT_EXPERTS = "hit_experts"  # the kernel's name in a compiled program
TILE_BYTES = 12 * 2**20  # of an expert's three matrices, held at once while the next ones are copied
LANES = 128
UNPACKED_BLOCKS = 8  # blocks of TILE_ROWS rows of MXFP4 that are unpacked at a time, at most
GROUPED_TILE = (512, 1024, 1024)  # rows, summed, columns of a step of the grouped product, at most

Ref = Any  # an array in a kernel's memory, read and written in place; Pallas has no public type for it

_NT = (((1,), (1,)), ((), ()))
_NN = (((1,), (0,)), ((), ()))


def experts(
    inputs: Float[Array, "M D"],
    hit: Int[Array, " hits"],
    num_hit: Int[Array, ""],
    share: Float[Array, "M E"],
    gate: Float[Array, "E F D"],
    gate_bias: Float[Array, "E F"],
    up: Float[Array, "E F D"],
    up_bias: Float[Array, "E F"],
    down: Float[Array, "E F D"],
    down_bias: Float[Array, "E D"],
    *,
    limit: float,
    interpret: bool = False,
) -> Float[Array, "M D"]:
    """Returns the sum over the first `num_hit` experts of `hit` by each token's share, float32 [M, D]."""
    num_experts, rows, width = gate.shape
    tile = _tile_rows(rows, 3 * width * gate.dtype.itemsize)
    steps = rows // tile
    matrix = pl.BlockSpec((1, tile, width), lambda index, step, hit: (hit[index], step, 0))
    bias = pl.BlockSpec((1, 1, 1, tile), lambda index, step, hit: (hit[index], step, 0, 0))
    return _over_hits(
        functools.partial(_experts_kernel, limit=limit),
        inputs,
        (hit, num_hit, share),
        [(array, matrix) for array in (gate, up, down)]
        + [(array.reshape(num_experts, steps, 1, tile), bias) for array in (gate_bias, up_bias)],
        (down_bias,),
        _KernelPlan(steps=steps),
        interpret=interpret,
    )


def packed_experts(
    inputs: Float[Array, "M D"],
    hit: Int[Array, " hits"],
    num_hit: Int[Array, ""],
    share: Float[Array, "M E"],
    gate: Packed,
    gate_bias: Float[Array, "E F"],
    up: Packed,
    up_bias: Float[Array, "E F"],
    down: Packed,
    down_bias: Float[Array, "E D"],
    *,
    limit: float,
    interpret: bool = False,
) -> Float[Array, "M D"]:
    """Returns what `experts` returns, for packed experts, whose axes are those of `ExpertsWeights`."""
    _, num_words, rows = gate.words.shape
    summed = num_words * mxfp4.ROWS_OF_WORD

    def whole(array: Array) -> tuple[Array, pl.BlockSpec]:
        shape = (1, *array.shape[1:])
        return array, pl.BlockSpec(shape, lambda index, step, hit: (hit[index], 0, 0))

    packed = [whole(part) for matrix in (gate, up, down) for part in (matrix.words, matrix.scales)]
    factors = [pltpu.VMEM(matrix.scales.shape[1:], jnp.int32) for matrix in (gate, up, down)]
    hidden = pltpu.VMEM((_padded_tokens(inputs.shape[0]), rows), inputs.dtype)
    return _over_hits(
        functools.partial(_packed_kernel, limit=limit, into=_blocks(summed, 1), back=_blocks(rows, 2)),
        jnp.pad(inputs, [(0, 0), (0, summed - inputs.shape[1])]),
        (hit, num_hit, share),
        packed,
        (down_bias, gate_bias, up_bias),
        _KernelPlan(chunk=_blocks(summed, 1) * mxfp4.TILE_ROWS, scratch=[*factors, hidden]),
        interpret=interpret,
    )


def ragged_product(
    rows: Float[Array, "M K"],
    matrices: Float[Array, "E K N"] | Float[Array, "E N K"],
    sizes: Int[Array, " E"],
    *,
    transposed: bool = False,
    interpret: bool = False,
) -> Float[Array, "M N"]:
    """Returns the first sizes[0] rows times the first matrix, and so on, in float32.

    Rows past all groups may come out as anything.
    """
    num_rows, summed = rows.shape
    columns = matrices.shape[1 if transposed else 2]
    step = min(GROUPED_TILE[0], -(-num_rows // ROW_TILE) * ROW_TILE)
    padded = jnp.pad(rows, [(0, -num_rows % step), (0, 0)])
    outputs = gmm(
        padded,
        matrices,
        sizes,
        preferred_element_type=jnp.float32,
        tiling=(step, min(summed, GROUPED_TILE[1]), min(columns, GROUPED_TILE[2])),
        transpose_rhs=transposed,
        interpret=interpret,
    )
    return outputs[:num_rows]


def _tile_rows(rows: int, row_bytes: int) -> int:
    """Returns how many of an expert's rows VMEM should hold: all, or the largest divisor that fills registers."""
    if rows * row_bytes <= TILE_BYTES:
        return rows
    fitting = range(ROW_TILE, TILE_BYTES // row_bytes + 1, ROW_TILE)
    return max((size for size in fitting if rows % size == 0), default=rows)


def _blocks(rows: int, multiple: int) -> int:
    """Returns how many blocks of packed rows are unpacked at a time, a divisor of their number."""
    count = rows // mxfp4.TILE_ROWS
    return max(size for size in range(multiple, UNPACKED_BLOCKS + 1, multiple) if count % size == 0)


def _padded_tokens(num_tokens: int) -> int:
    return -(-num_tokens // ROW_TILE) * ROW_TILE


@dataclasses.dataclass(frozen=True)
class _KernelPlan:
    """Holds how a kernel walks over an expert: in `steps` parts, with arrays of its own in `scratch`.

    With a `chunk` the inputs come as [width / chunk, M, chunk].
    """

    steps: int = 1
    chunk: int | None = None
    scratch: Sequence[Any] = ()


def _over_hits(
    kernel: Callable[..., None],
    inputs: Float[Array, "M width"],
    hits: tuple[Int[Array, " hits"], Int[Array, ""], Float[Array, "M E"]],
    operands: list[tuple[Array, pl.BlockSpec]],
    biases: Sequence[Float[Array, "E _"]],
    plan: _KernelPlan,
    *,
    interpret: bool,
) -> Float[Array, "M D"]:
    """Runs `kernel` over every expert that is hit; it adds to its output [M, D].

    `biases`, down's first, come whole and in float32, of which any row can be taken.
    """
    hit, num_hit, share = hits
    num_tokens = inputs.shape[0]
    lacking = _padded_tokens(num_tokens) - num_tokens
    inputs, share = (jnp.pad(array, [(0, lacking), (0, 0)]) for array in (inputs, share))
    rows = inputs.shape[0]
    if plan.chunk is not None:
        inputs = jnp.moveaxis(inputs.reshape(rows, -1, plan.chunk), 1, 0)

    def everything(array: Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
        return pl.BlockSpec(array.shape, lambda index, step, hit: (0,) * array.ndim)

    outputs = jax.ShapeDtypeStruct((rows, biases[0].shape[1]), jnp.float32)
    small = [inputs, share, *(bias.astype(jnp.float32) for bias in biases)]
    arrays = [in_hbm(array, interpret=interpret) for array, _ in operands]
    summed = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(num_hit, plan.steps),
            in_specs=[*map(everything, small), *(spec for _, spec in operands)],
            out_specs=everything(outputs),
            scratch_shapes=plan.scratch,
        ),
        out_shape=outputs,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
        name=HIT_EXPERTS,
        cost_estimate=_cost(outputs.shape, hit.shape[0], [array for array, _ in operands]),
    )(hit, *small, *arrays)
    return jnp.where(num_hit > 0, summed[:num_tokens], 0)  # without a hit the kernel writes nothing


def _cost(output_shape: tuple[int, ...], max_hit: int, operands: Sequence[Array]) -> pl.CostEstimate:
    """Returns the cost that the compiler plans with, of as many experts as can be hit."""
    num_tokens, width = output_shape
    sizes = [math.prod(array.shape[1:]) for array in operands]  # of one expert
    num_bytes = sum(size * array.dtype.itemsize for size, array in zip(sizes, operands, strict=True))
    values = sum(size * (8 if array.dtype == jnp.int32 else 1) for size, array in zip(sizes, operands, strict=True))
    return pl.CostEstimate(
        flops=2 * max_hit * num_tokens * values,
        bytes_accessed=max_hit * num_bytes,
        transcendentals=max_hit * num_tokens * values // (3 * width),
    )


def _experts_kernel(
    hit: Ref,
    inputs: Ref,
    share: Ref,
    down_bias: Ref,
    gate: Ref,
    up: Ref,
    down: Ref,
    gate_bias: Ref,
    up_bias: Ref,
    outputs: Ref,
    *,
    limit: float,
) -> None:
    token_share = _begin(hit, share, down_bias, outputs)
    gates = _dot(inputs[...], gate[0], _NT) + gate_bias[0, 0].astype(jnp.float32)
    ups = _dot(inputs[...], up[0], _NT) + up_bias[0, 0].astype(jnp.float32)
    hidden = _swiglu(gates, ups, limit) * token_share
    outputs[...] += _dot(hidden.astype(inputs.dtype), down[0], _NN)


def _packed_kernel(
    hit: Ref,
    inputs: Ref,
    share: Ref,
    down_bias: Ref,
    gate_bias: Ref,
    up_bias: Ref,
    gate: Ref,
    gate_scales: Ref,
    up: Ref,
    up_scales: Ref,
    down: Ref,
    down_scales: Ref,
    outputs: Ref,
    gate_factors: Ref,
    up_factors: Ref,
    down_factors: Ref,
    hidden: Ref,
    *,
    limit: float,
    into: int,
    back: int,
) -> None:
    """Unpacks `into` blocks of rows of gate and up at a time, and `back` blocks of down."""
    token_share = _begin(hit, share, down_bias, outputs)
    gate_factors[...], up_factors[...], down_factors[...] = (
        mxfp4.scale_words(scales[0]) for scales in (gate_scales, up_scales, down_scales)
    )

    def add(step: Int[Array, ""], sums: tuple[Array, Array]) -> tuple[Array, Array]:
        columns = inputs[step]
        gates, ups = (
            _dot(columns, _unpacked(words, factors, step, into, inputs.dtype), _NN)
            for words, factors in ((gate, gate_factors), (up, up_factors))
        )
        return sums[0] + gates, sums[1] + ups

    zeros = jnp.zeros((inputs.shape[1], gate.shape[-1]), jnp.float32)
    gates, ups = jax.lax.fori_loop(0, inputs.shape[0], add, (zeros, zeros))
    expert = pl.ds(hit[pl.program_id(0)], 1)
    gates, ups = gates + gate_bias[expert], ups + up_bias[expert]
    hidden[...] = (_swiglu(gates, ups, limit) * token_share).astype(hidden.dtype)
    rows = back * mxfp4.TILE_ROWS

    def add_back(step: Int[Array, ""], _: None) -> None:
        columns = hidden[:, pl.ds(pl.multiple_of(step * rows, LANES), rows)]
        outputs[...] += _dot(columns, _unpacked(down, down_factors, step, back, inputs.dtype), _NN)

    jax.lax.fori_loop(0, hidden.shape[1] // rows, add_back, None)


def _unpacked(words: Ref, factors: Ref, step: Int[Array, ""], count: int, dtype: jnp.dtype) -> Float[Array, "rows N"]:
    """Returns `count` blocks of rows of one expert, from block step * count on."""
    size = mxfp4.TILE_ROWS // mxfp4.ROWS_OF_WORD
    block_words = words[0, pl.ds(pl.multiple_of(step * count * size, size), count * size)]
    parts: list[Array] = []
    for block in range(count):
        first = 2 * (step * count + block)
        scales = factors[pl.ds(first, 1)], factors[pl.ds(first + 1, 1)]
        parts += mxfp4.pairs_of(block_words[block * size : (block + 1) * size], scales)
    return jnp.concatenate([pltpu.bitcast(pairs, jnp.bfloat16) for pairs in parts], axis=0).astype(dtype)


def _begin(hit: Ref, share: Ref, down_bias: Ref, outputs: Ref) -> Float[Array, "M 1"]:
    """Returns each token's share of this expert, and starts its outputs with that share of the bias."""
    index, step = pl.program_id(0), pl.program_id(1)
    expert = hit[index]
    column = jax.lax.broadcasted_iota(jnp.int32, share.shape, 1)
    token_share = jnp.where(column == expert, share[...], 0).sum(axis=1, keepdims=True)

    @pl.when((index == 0) & (step == 0))
    def _() -> None:
        outputs[...] = jnp.zeros_like(outputs)

    @pl.when(step == 0)
    def _() -> None:
        outputs[...] += token_share * down_bias[pl.ds(expert, 1)]

    return token_share


def _dot(left: Float[Array, "..."], right: Float[Array, "..."], numbers: tuple) -> Float[Array, "..."]:
    return jax.lax.dot_general(left, right, numbers, preferred_element_type=jnp.float32)


def _swiglu(gate: Float[Array, "M F"], up: Float[Array, "M F"], limit: float) -> Float[Array, "M F"]:
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return (up + 1) * gate * jax.nn.sigmoid(1.702 * gate)
