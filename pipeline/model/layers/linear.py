"""Matrix products in the precision of their operands."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pipeline.model.layers.pytree import pytree_dataclass
from pipeline.model.parallel.shards import UNSHARDED, Shards


@pytree_dataclass()
class TransposedMatrix:
    """A matrix [in, out] that is stored [out, in], as in HF files.

    bfloat16 matrices are stored so: XLA:CPU multiplies one bfloat16 row by a matrix [out, in] ten times as fast as by
    one [in, out] (measured), and accelerators are as fast with either. Float32 matrices are stored [in, out], where
    XLA:CPU is up to twice as fast for the eight rows of a block.
    """

    array: Float[Array, "out in"]


def is_stored_transposed(dtype: DTypeLike) -> bool:
    """Returns whether matrices of this precision are stored as `TransposedMatrix`."""
    return jnp.dtype(dtype) == jnp.bfloat16


Matrix = Float[Array, "in out"] | TransposedMatrix


def einsum(equation: str, *operands: Array) -> Array:
    """Returns `jnp.einsum` in the operands' own precision, summed and returned in float32.

    By default accelerators multiply float32 in bfloat16 passes; a float32 model asks for the exact product, a bfloat16
    model takes the native one.
    """
    exact = all(operand.dtype == jnp.float32 for operand in operands)
    precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
    # for a bfloat16 result XLA:CPU would first write bfloat16 operands to memory as float32
    return jnp.einsum(equation, *operands, precision=precision, preferred_element_type=jnp.float32)


def product(inputs: Float[Array, "*batch in"], matrix: Matrix) -> Float[Array, "*batch out"]:
    """Returns inputs @ matrix, float32 [*batch, out]."""
    if isinstance(matrix, TransposedMatrix):
        outputs = einsum("...i,oi->...o", inputs, matrix.array)
    else:
        outputs = einsum("...i,io->...o", inputs, matrix)
    return _not_fused(outputs) if inputs.size == inputs.shape[-1] else outputs


def _not_fused(outputs: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns a product of one row so that on a CPU nothing is fused behind it.

    XLA:CPU then reads a bfloat16 matrix twenty times as fast, a float32 one up to twice as fast (measured).
    """
    return jax.lax.platform_dependent(outputs, cpu=jax.lax.optimization_barrier, default=lambda same: same)


def linear(
    inputs: Float[Array, "*batch in"], matrix: Matrix, bias: Float[Array, " out"] | None = None
) -> Float[Array, "*batch out"]:
    """Returns inputs @ matrix + bias [*batch, out], in the precision of the inputs."""
    outputs = product(inputs, matrix)
    return (outputs if bias is None else outputs + bias).astype(inputs.dtype)


def linear_over_shards(
    inputs: Float[Array, "*batch in"],
    matrix: Matrix,
    bias: Float[Array, " out"] | None = None,
    shards: Shards = UNSHARDED,
) -> Float[Array, "*batch out"]:
    """Returns inputs @ matrix + bias [*batch, out]; each shard holds a part of `in`, and gets the whole sum."""
    outputs = shards.sum(product(inputs, matrix))
    return (outputs if bias is None else outputs + bias).astype(inputs.dtype)


def random_matrix(key: Array, fan_in: int, fan_out: int, dtype: DTypeLike, scale: float = 1.0) -> Matrix:
    """Returns a matrix [in, out] of normal numbers of deviation scale/sqrt(fan_in), stored as its dtype wants it."""
    shape = (fan_out, fan_in) if is_stored_transposed(dtype) else (fan_in, fan_out)
    values = (scale * fan_in**-0.5 * jax.random.normal(key, shape)).astype(dtype)
    return TransposedMatrix(values) if is_stored_transposed(dtype) else values


def rms_norm(
    inputs: Float[Array, "*batch width"], weight: Float[Array, " width"], eps: float
) -> Float[Array, "*batch width"]:
    """Returns the root-mean-square norm with a learned scale."""
    values = inputs.astype(jnp.float32)  # as in transformers: the mean of squares needs float32's range
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(values), axis=-1, keepdims=True) + eps)
    return (weight.astype(jnp.float32) * (values * scale)).astype(inputs.dtype)
