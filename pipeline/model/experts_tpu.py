"""Experts on a TPU: one Pallas kernel reads each expert that is hit once and nothing else, MXFP4 or bfloat16.

The grid walks the experts that are hit, as many as there are; their numbers are known before the kernel starts
(scalar prefetch), so each expert's matrices are copied from HBM while the one before is multiplied. MXFP4 is
unpacked in VMEM, a few rows at a time. Many tokens go through JAX's own grouped matrix product (megablox).
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.megablox import gmm
from jaxtyping import Array, Float, Int

from pipeline.model import mxfp4
from pipeline.model.mxfp4 import Packed

HIT_EXPERTS = "hit_experts"  # the kernel's name in a compiled program
TILE_BYTES = 12 * 2**20  # of an expert's three matrices held at once; the next ones are copied meanwhile
VMEM_BYTES = 48 * 2**20  # a kernel's share; every chip since v5e has at least 64 MiB
TOKEN_TILE = 16  # rows of bfloat16 in a register
PACKED_TILE = 32  # rows of bytes in a register
PAIRS_SHIFT = 4  # 2**4 bytes, two values each, share a scale; a shift, for the kernel compiler divides signed numbers
UNPACKED_ROWS = 160  # pairs of rows of MXFP4 that are unpacked at a time, at most
GROUPED_TILE = (512, 1024, 1024)  # rows, summed, columns of a step of the grouped product, at most

_NT = (((1,), (1,)), ((), ()))
_NN = (((1,), (0,)), ((), ()))


def experts(
    inputs: Float[Array, "M D"],
    hit: Int[Array, " slots"],
    count: Int[Array, ""],
    shares: Float[Array, "slots M"],
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
    """The shares' sum over the first `count` experts of `hit`, in float32; operands in bfloat16."""
    num_experts, rows, width = gate.shape
    tile = _tile_rows(rows, 3 * width * gate.dtype.itemsize)
    steps = rows // tile
    matrix = pl.BlockSpec((1, tile, width), lambda slot, step, hit: (hit[slot], step, 0))
    bias = pl.BlockSpec((1, 1, 1, tile), lambda slot, step, hit: (hit[slot], step, 0, 0))
    return _over_hits(
        functools.partial(_experts_kernel, limit=limit),
        inputs,
        (hit, count, shares),
        [(array, matrix) for array in (gate, up, down)]
        + [(array.reshape(num_experts, steps, 1, tile), bias) for array in (gate_bias, up_bias)],
        down_bias,
        steps=steps,
        interpret=interpret,
    )


def packed_experts(
    inputs: Float[Array, "M D"],
    hit: Int[Array, " slots"],
    count: Int[Array, ""],
    shares: Float[Array, "slots M"],
    gate: Packed,
    gate_bias: Float[Array, "E 2 half"],
    up: Packed,
    up_bias: Float[Array, "E 2 half"],
    down: Packed,
    down_bias: Float[Array, "E D"],
    *,
    limit: float,
    interpret: bool = False,
) -> Float[Array, "M D"]:
    """As `experts` for packed ones, which lie as ExpertsWeights tells."""
    num_experts, pairs, _ = down.blocks.shape
    tile = max(rows for rows in range(PACKED_TILE, UNPACKED_ROWS + 1, PACKED_TILE) if pairs % rows == 0)

    def whole(array: Array) -> tuple[Array, pl.BlockSpec]:
        shape = (1, *array.shape[1:])
        return array, pl.BlockSpec(shape, lambda slot, step, hit: (hit[slot], *[0] * (len(shape) - 1)))

    packed = [whole(part) for one in (gate, up, down) for part in (one.blocks, one.scales)]
    biases = [whole(array.reshape(num_experts, 2, pairs // tile, 1, tile)) for array in (gate_bias, up_bias)]
    return _over_hits(
        functools.partial(_packed_kernel, limit=limit, tile=tile),
        mxfp4.even_odd(inputs),
        (hit, count, shares),
        packed + biases,
        down_bias,
        steps=1,
        interpret=interpret,
    )


def ragged_product(
    rows: Float[Array, "M in"],
    matrices: Float[Array, "E in out"] | Float[Array, "E out in"],
    sizes: Int[Array, " E"],
    *,
    transposed: bool = False,
    interpret: bool = False,
) -> Float[Array, "M out"]:
    """The first sizes[0] rows times the first matrix, and so on, in float32; rows past all groups give anything."""
    num_rows, summed = rows.shape
    columns = matrices.shape[1 if transposed else 2]
    step = min(GROUPED_TILE[0], -(-num_rows // TOKEN_TILE) * TOKEN_TILE)
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
    """The largest part of an expert's rows that VMEM should hold: all, or a divisor that fills registers."""
    if rows * row_bytes <= TILE_BYTES:
        return rows
    fitting = range(TOKEN_TILE, TILE_BYTES // row_bytes + 1, TOKEN_TILE)
    return max((size for size in fitting if rows % size == 0), default=rows)


def _over_hits(
    kernel: object,
    inputs: Float[Array, "M D"],
    found: tuple[Int[Array, " slots"], Int[Array, ""], Float[Array, "slots M"]],
    operands: list[tuple[Array, pl.BlockSpec]],
    down_bias: Float[Array, "E D"],
    *,
    steps: int,
    interpret: bool,
) -> Float[Array, "M D"]:
    """Run `kernel` over `steps` parts of every expert that is hit; it adds to its output [M, D]."""
    hit, count, shares = found
    num_tokens, width = inputs.shape
    lacking = -num_tokens % TOKEN_TILE
    inputs = jnp.pad(inputs, [(0, lacking), (0, 0)])
    shares = jnp.pad(shares, [(0, 0), (0, lacking)])
    rows = inputs.shape[0]
    share = pl.BlockSpec((1, rows, 1), lambda slot, step, hit: (slot, 0, 0))
    bias = pl.BlockSpec((1, 1, width), lambda slot, step, hit: (hit[slot], 0, 0))
    everything = pl.BlockSpec((rows, width), lambda slot, step, hit: (0, 0))
    # XLA would copy what fits into VMEM as a whole, experts that are not hit included
    arrays = [array if interpret else pltpu.with_memory_space_constraint(array, pltpu.HBM) for array, _ in operands]
    outputs = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(count, steps),
            in_specs=[everything, share, bias, *(spec for _, spec in operands)],
            out_specs=everything,
        ),
        out_shape=jax.ShapeDtypeStruct((rows, width), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
        name=HIT_EXPERTS,
        cost_estimate=_cost(rows, hit.shape[0], [array for array, _ in operands]),
    )(hit, inputs, shares[..., None], down_bias[:, None].astype(jnp.float32), *arrays)
    return jnp.where(count > 0, outputs[:num_tokens], 0)  # a kernel that no expert runs writes nothing


def _cost(num_tokens: int, num_hit: int, operands: Sequence[Array]) -> pl.CostEstimate:
    """What the compiler plans with: as many experts are hit as can be."""
    one = [math.prod(array.shape[1:]) for array in operands]
    num_bytes = sum(size * array.dtype.itemsize for size, array in zip(one, operands, strict=True))
    values = sum(size * (2 if array.dtype == jnp.uint8 else 1) for size, array in zip(one, operands, strict=True))
    return pl.CostEstimate(
        flops=2 * num_hit * num_tokens * values,
        bytes_accessed=num_hit * num_bytes,
        transcendentals=num_hit * num_tokens * values // (3 * operands[0].shape[-1]),
    )


def _experts_kernel(
    hit, inputs, share, down_bias, gate, up, down, gate_bias, up_bias, outputs, *, limit: float
) -> None:
    _begin(share, down_bias, outputs)
    gates = _dot(inputs[...], gate[0], _NT) + gate_bias[0, 0].astype(jnp.float32)
    ups = _dot(inputs[...], up[0], _NT) + up_bias[0, 0].astype(jnp.float32)
    hidden = _swiglu(gates, ups, limit) * share[0]
    outputs[...] += _dot(hidden.astype(inputs.dtype), down[0], _NN)


def _packed_kernel(
    hit,
    inputs,
    share,
    down_bias,
    gate,
    gate_scales,
    up,
    up_scales,
    down,
    down_scales,
    gate_bias,
    up_bias,
    outputs,
    *,
    limit: float,
    tile: int,
) -> None:
    _begin(share, down_bias, outputs)
    dtype, half = inputs.dtype, gate.shape[-1]
    spread = _spread(gate_scales.shape[-1], half, dtype)
    even, odd = inputs[:, :half], inputs[:, half:]
    down_factors = mxfp4.scale_of(down_scales[0]).astype(dtype)

    def product(blocks, scales, bias, parity: int, step: Int[Array, ""]) -> Float[Array, "M rows"]:
        at = pl.ds(pl.multiple_of(step * tile, PACKED_TILE), tile)
        factors = _dot(mxfp4.scale_of(scales[0, parity, at]).astype(dtype), spread, _NN)
        codes = blocks[0, parity, at].astype(jnp.int32)
        low, high = ((mxfp4.value_of(part) * factors).astype(dtype) for part in (codes & 15, codes >> 4))
        return _dot(even, low, _NT) + _dot(odd, high, _NT) + bias[0, parity, step].astype(jnp.float32)

    def add(step: Int[Array, ""], _: None) -> None:
        at = pl.ds(pl.multiple_of(step * tile, PACKED_TILE), tile)
        codes = down[0, at].astype(jnp.int32)
        # rows of bytes, each under the scale of its group: a product with ones and zeros, exact, copies it there
        group = jax.lax.broadcasted_iota(jnp.int32, (tile, down_factors.shape[0]), 1)
        row = jax.lax.broadcasted_iota(jnp.int32, (tile, down_factors.shape[0]), 0) + step * tile
        factors = _dot((row >> PAIRS_SHIFT == group).astype(dtype), down_factors, _NN)
        for parity, part in enumerate((codes & 15, codes >> 4)):
            gates = product(gate, gate_scales, gate_bias, parity, step)
            ups = product(up, up_scales, up_bias, parity, step)
            hidden = _swiglu(gates, ups, limit) * share[0]
            rows = (mxfp4.value_of(part) * factors).astype(dtype)
            outputs[...] += _dot(hidden.astype(dtype), rows, _NN)

    jax.lax.fori_loop(0, down.shape[1] // tile, add, None)


def _begin(share, down_bias, outputs) -> None:
    slot, step = pl.program_id(0), pl.program_id(1)

    @pl.when((slot == 0) & (step == 0))
    def _() -> None:
        outputs[...] = jnp.zeros_like(outputs)

    @pl.when(step == 0)
    def _() -> None:
        outputs[...] += share[0] * down_bias[0]


def _spread(num_groups: int, width: int, dtype: jnp.dtype) -> Float[Array, "groups width"]:
    """Ones where a column belongs to a group: the product with it copies each group's scale to its columns."""
    group = jax.lax.broadcasted_iota(jnp.int32, (num_groups, width), 0)
    column = jax.lax.broadcasted_iota(jnp.int32, (num_groups, width), 1)
    return (column >> PAIRS_SHIFT == group).astype(dtype)


def _dot(left: Float[Array, "..."], right: Float[Array, "..."], numbers: tuple) -> Float[Array, "..."]:
    return jax.lax.dot_general(left, right, numbers, preferred_element_type=jnp.float32)


def _swiglu(gate: Float[Array, "M F"], up: Float[Array, "M F"], limit: float) -> Float[Array, "M F"]:
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return (up + 1) * gate * jax.nn.sigmoid(1.702 * gate)
