"""Matrix products at the precision their operands carry."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def einsum(equation: str, *operands: Array) -> Array:
    """`jnp.einsum` in the operands' own precision.

    Accelerators multiply float32 in bfloat16 passes unless told otherwise; a float32 model asks for the
    exact product, a bfloat16 one takes the native one.
    """
    exact = all(operand.dtype == jnp.float32 for operand in operands)
    precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
    return jnp.einsum(equation, *operands, precision=precision)


def linear(
    inputs: Float[Array, "*batch in"], kernel: Float[Array, "in out"], bias: Float[Array, " out"] | None = None
) -> Float[Array, "*batch out"]:
    """inputs @ kernel + bias."""
    outputs = einsum("...i,io->...o", inputs, kernel)
    return outputs if bias is None else outputs + bias


def rms_norm(
    inputs: Float[Array, "*batch width"], weight: Float[Array, " width"], eps: float
) -> Float[Array, "*batch width"]:
    """Root-mean-square norm with a learned scale."""
    wide = inputs.astype(jnp.float32)  # as in transformers: the mean of squares needs float32's range
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (weight.astype(jnp.float32) * (wide * scale)).astype(inputs.dtype)
