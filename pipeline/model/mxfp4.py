"""MXFP4: blocks of 32 four-bit floats (E2M1) that share an eight-bit power of two (E8M0).

Source: OCP Microscaling Formats specification 1.0, sections 5.3.3 and 5.4.1. A byte holds two neighbours along
the packed axis, the even one in its low half, so unpacked values come as evens and odds apart. They are left so
(`even_odd`): on a TPU, weaving two arrays along the last axis costs more than all the rest.
"""

import dataclasses
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer, UInt8

BLOCK = 32  # values that share a scale
NOT_A_NUMBER = 255  # the scale that E8M0 reserves
VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)  # of the codes 0..7; the fourth bit is the sign


@no_type_check  # JAX rebuilds it around shapes, masks and gradients too
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """Values packed along one axis: a byte for two of them, a scale for 32."""

    blocks: UInt8[Array, "..."]
    scales: UInt8[Array, "..."]


def even_odd(values: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
    """The last axis with its even places first, then its odd ones: the order in which unpacked values come."""
    pairs = values.reshape(*values.shape[:-1], -1, 2)
    return jnp.concatenate([pairs[..., 0], pairs[..., 1]], axis=-1)


def unpack(packed: Packed, axis: int, dtype: DTypeLike) -> tuple[Array, Array]:
    """The values at even and at odd places of the packed axis, each half as long as it."""
    scale = jnp.repeat(scale_of(packed.scales), BLOCK // 2, axis=axis)
    low, high = packed.blocks & 15, packed.blocks >> 4
    return (value_of(low) * scale).astype(dtype), (value_of(high) * scale).astype(dtype)


def value_of(codes: Integer[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The float32 value of four-bit codes, by arithmetic on bits: a table look-up per value is slow on a TPU."""
    codes = codes.astype(jnp.int32)
    magnitude = codes & 7  # two bits of exponent, one of mantissa
    bits = (magnitude << 22) + (126 << 23)  # float32's exponent and first mantissa bit, the exponent re-biased
    bits = jnp.where(magnitude < 2, magnitude * (126 << 23), bits)  # 0 and 0.5 have no leading one
    return jax.lax.bitcast_convert_type(bits | ((codes & 8) << 28), jnp.float32)


def scale_of(scales: Integer[Array, "*shape"]) -> Float[Array, "*shape"]:
    """2 ** (scale - 127) in float32; 2 ** -127 becomes 0, as it does on hardware without subnormal numbers."""
    return jax.lax.bitcast_convert_type(scales.astype(jnp.int32) << 23, jnp.float32)


def dequantised(
    blocks: UInt8[np.ndarray, "E *batch groups 16"], scales: UInt8[np.ndarray, "E *batch groups"], dtype: DTypeLike
) -> np.ndarray:
    """The values [E, *batch, groups * 32] of blocks as files have them, on the host, one expert after the other.

    bfloat16 holds every value exactly. A subnormal number of float32 or bfloat16 becomes what it is there.
    """
    table = np.concatenate([VALUES, -VALUES])
    values = np.empty((*scales.shape, BLOCK), jnp.dtype(dtype))
    for one, block, scale in zip(values, blocks, scales, strict=True):
        factor = np.ldexp(np.float32(1), scale.astype(np.int32) - 127)[..., None]
        one[..., 0::2] = table[block & 15] * factor
        one[..., 1::2] = table[block >> 4] * factor
    return values.reshape(*scales.shape[:-1], -1)
