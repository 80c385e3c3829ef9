"""Matrix products at the precision their operands carry."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pipeline.model.layers.pytree import pytree_dataclass
from pipeline.model.parallel.shards import UNSHARDED, Shards


@pytree_dataclass()
class TransposedMatrix:
    """A kernel [in, out] that lies [out, in], as HF files have it.

    bfloat16 kernels are read as they lie: XLA:CPU multiplies one bfloat16 row by a kernel [out, in] ten times as
    fast as by one [in, out] (measured), and accelerators do not mind. Float32 ones lie [in, out], where XLA:CPU is
    up to twice as fast for the eight rows of a block.
    """

    array: Float[Array, "out in"]


def is_stored_transposed(dtype: DTypeLike) -> bool:
    """Whether kernels of this precision are held `Transposed`."""
    return jnp.dtype(dtype) == jnp.bfloat16


Matrix = Float[Array, "in out"] | TransposedMatrix


def einsum(equation: str, *operands: Array) -> Array:
    """`jnp.einsum` in the operands' own precision, summed and returned in float32.

    Accelerators multiply float32 in bfloat16 passes unless told otherwise; a float32 model asks for the
    exact product, a bfloat16 one takes the native one.
    """
    exact = all(operand.dtype == jnp.float32 for operand in operands)
    precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
    # XLA:CPU would turn bfloat16 operands of a bfloat16 result to float32 in memory first
    return jnp.einsum(equation, *operands, precision=precision, preferred_element_type=jnp.float32)


def product(inputs: Float[Array, "*batch in"], kernel: Matrix) -> Float[Array, "*batch out"]:
    """inputs @ kernel, in float32."""
    if isinstance(kernel, TransposedMatrix):
        outputs = einsum("...i,oi->...o", inputs, kernel.array)
    else:
        outputs = einsum("...i,io->...o", inputs, kernel)
    return _by_itself(outputs) if inputs.size == inputs.shape[-1] else outputs


def _by_itself(outputs: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """On a CPU, a product of one row with nothing fused behind it.

    XLA:CPU reads a bfloat16 kernel twenty times as fast then, a float32 one up to twice (measured).
    """
    return jax.lax.platform_dependent(outputs, cpu=jax.lax.optimization_barrier, default=lambda same: same)


def linear(
    inputs: Float[Array, "*batch in"], kernel: Matrix, bias: Float[Array, " out"] | None = None
) -> Float[Array, "*batch out"]:
    """inputs @ kernel + bias."""
    outputs = product(inputs, kernel)
    return (outputs if bias is None else outputs + bias).astype(inputs.dtype)


def linear_over_shards(
    inputs: Float[Array, "*batch in"],
    kernel: Matrix,
    bias: Float[Array, " out"] | None = None,
    shards: Shards = UNSHARDED,
) -> Float[Array, "*batch out"]:
    """inputs @ kernel + bias where each shard holds a part of `in`; every shard gets the whole sum."""
    outputs = shards.sum(product(inputs, kernel))
    return (outputs if bias is None else outputs + bias).astype(inputs.dtype)


def random_matrix(key: Array, fan_in: int, fan_out: int, dtype: DTypeLike, scale: float = 1.0) -> Matrix:
    """Normal numbers of deviation scale/sqrt(fan_in), lying as a kernel of `dtype` does."""
    shape = (fan_out, fan_in) if is_stored_transposed(dtype) else (fan_in, fan_out)
    values = (scale * fan_in**-0.5 * jax.random.normal(key, shape)).astype(dtype)
    return TransposedMatrix(values) if is_stored_transposed(dtype) else values


def rms_norm(
    inputs: Float[Array, "*batch width"], weight: Float[Array, " width"], eps: float
) -> Float[Array, "*batch width"]:
    """Root-mean-square norm with a learned scale."""
    wide = inputs.astype(jnp.float32)  # as in transformers: the mean of squares needs float32's range
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (weight.astype(jnp.float32) * (wide * scale)).astype(inputs.dtype)
