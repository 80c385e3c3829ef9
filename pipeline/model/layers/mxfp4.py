"""MXFP4: blocks of 32 four-bit floats (E2M1) that share an eight-bit power of two (E8M0).

Source: OCP Microscaling Formats specification 1.0, sections 5.3.3 and 5.4.1. Files have a byte for two neighbours
along the packed axis and a byte of scale for 32. In device memory the values take the same four bits and the scale
the same byte, but the bits are ordered so that unpacking costs least, for on a TPU unpacking takes more time than
reading memory: a word of 32 bits holds eight values of one column, and yields pairs of them as bfloat16 numbers after a
few operations on whole words.

A word's halves belong to even and odd rows. The four values of a half have sign and magnitude at `_BITS`: the first
where bfloat16 has its sign, the last two bits of its exponent and the first of its mantissa; the second and third so
that a shift brings them there; the last in the bits that are left. Magnitudes are numbered as bfloat16 counts, 0.5,
0.75, 1, 1.5, 2, 3, 4, 6; zero takes the number of 0.75, which E2M1 lacks, and is masked. Adding to the exponent scales.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32, UInt8, UInt32

from pipeline.model.layers.pytree import pytree_dataclass

BLOCK = 32  # values that share a scale
ROWS_OF_WORD = 8
TILE_ROWS = 64  # rows of eight words, which are unpacked together: the packed axis is padded to a multiple
LARGEST_SCALE = 252  # bfloat16 holds six times the power of two that it stands for; 255 is E8M0's "not a number"
VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)  # of the codes 0..7; the fourth bit is the sign

_BITS = ((6, 7, 8, 15), (3, 4, 5, 12), (0, 1, 2, 9), (10, 11, 13, 14))  # of magnitude, from its lowest, and sign
_ZERO = 1  # the number of zero among the magnitudes


def _both(half: int) -> int:
    """Returns 16 bits in both halves of a word, as a signed number."""
    return int(np.uint32(half << 16 | half).view(np.int32))


_VALUE = _both(0x81C0)  # the bits of a value
_ONE = _both(0x0001)


@pytree_dataclass()
class Packed:
    """Holds matrices [.., K, N] packed along K, a multiple of TILE_ROWS: a word for 8 values, a scale for BLOCK."""

    words: Int32[Array, "*batch words N"]
    scales: UInt8[Array, "*batch groups N"]


def padded(size: int) -> int:
    """Returns the size of a packed axis, padding included."""
    return -(-size // TILE_ROWS) * TILE_ROWS


def unpack(packed: Packed, dtype: DTypeLike) -> Float[Array, "*batch K N"]:
    """Returns the values [*batch, K, N] of packed matrices."""
    *batch, num_words, width = packed.words.shape  # eight words side by side are TILE_ROWS rows
    words = packed.words.reshape(*batch, num_words // 8, 8, width)
    factors = scale_words(packed.scales).reshape(*batch, num_words // 8, 2, 1, width)
    pairs = jnp.stack(list(pairs_of(words, (factors[..., 0, :, :], factors[..., 1, :, :]))), axis=-3)
    even, odd = pairs << 16, pairs & ~0xFFFF
    values = [jax.lax.bitcast_convert_type(half, jnp.float32) for half in (even, odd)]
    return jnp.stack(values, axis=-2).reshape(*batch, num_words * ROWS_OF_WORD, width).astype(dtype)


def scale_words(scales: UInt8[Array, "*shape"]) -> Int32[Array, "*shape"]:
    """Returns what is added to both halves of words of values to scale them; scales are at least 1."""
    less = scales.astype(jnp.int32) - 1
    return less << 7 | less << 23  # where the exponents begin


def pairs_of(
    words: Int32[Array, "*batch 8 N"], scale_words: tuple[Int32[Array, "*batch 1 N"], Int32[Array, "*batch 1 N"]]
) -> Iterator[Int32[Array, "*batch 8 N"]]:
    """Yields the rows of eight words, 16 at a time: pairs of bfloat16 numbers, even rows in the low halves.

    `scale_words` are those of the first and of the second BLOCK rows.
    """
    right = jax.lax.shift_right_logical
    # at the lowest bit of each magnitude: whether that bit is 0 or another bit of the magnitude is 1 (it is not zero)
    two = ~words | right(words, 1)
    three, last = two | right(words, 2), two | right(words, 3)
    values = (
        words & _VALUE,
        (words << 3) & _VALUE,
        (words << 6) & _VALUE,
        (right(words, 4) & _both(0x00C0)) | (right(words, 5) & _both(0x0100)) | ((words << 1) & _both(0x8000)),
    )
    not_zero = (right(three, 6), right(three, 3), three, right(last, 10))
    for number, (value, flag) in enumerate(zip(values, not_zero, strict=True)):
        flag &= _ONE
        mask = (flag << 16) - flag  # all bits of the halves whose flag is set
        yield (value + scale_words[number // 2]) & mask


def _word_table() -> UInt32[np.ndarray, "4 256"]:
    """Returns a word for each index in a half and each byte of a file: the byte's low value in the low half."""
    table = np.zeros((4, 256), np.uint32)
    for byte in range(256):
        for shift, code in ((0, byte & 15), (16, byte >> 4)):
            sign, magnitude = code >> 3, code & 7
            if magnitude < 2:  # 0 and 0.5
                sign, magnitude = (0, _ZERO) if magnitude == 0 else (sign, 0)
            bits = [magnitude & 1, magnitude >> 1 & 1, magnitude >> 2, sign]
            for index, positions in enumerate(_BITS):
                word = sum(bit << position for bit, position in zip(bits, positions, strict=True))
                table[index, byte] |= word << shift
    return table


_TABLE = _word_table()
_ZEROS = int(np.bitwise_or.reduce(_TABLE[:, 0]).view(np.int32))  # a word of eight zeros


def words_of(
    blocks: UInt8[np.ndarray, "E n groups 16"], scales: UInt8[np.ndarray, "E n groups"], rows: int, width: int
) -> Int32[np.ndarray, "E words {width}"]:
    """Returns the words of a file's blocks with zeros behind them, [E, rows / 8, width], on the host.

    A value whose scale is 0, 2 ** -127, becomes zero, as it does on hardware without subnormal numbers.
    """
    num_experts, num_columns, groups, _ = blocks.shape
    words = np.full((num_experts, rows // ROWS_OF_WORD, width), _ZEROS, np.int32)
    for expert, block, scale in zip(words, blocks, scales, strict=True):
        if (scale == 0).any():
            block = np.where(scale[..., None] == 0, np.uint8(0), block)
        if groups % 2:
            block = np.pad(block, [(0, 0), (0, 1), (0, 0)])
        in_half = block.reshape(num_columns, block.shape[1] // 2, 4, 8)  # a shard may have padding alone
        packed = _TABLE[0][in_half[:, :, 0]]
        for index in range(1, 4):
            packed |= _TABLE[index][in_half[:, :, index]]
        packed = packed.view(np.int32).reshape(num_columns, in_half.shape[1] * 8)
        expert[: packed.shape[1], :num_columns] = packed.T
    return words


def scales_of(scales: UInt8[np.ndarray, "E n groups"], rows: int, width: int) -> UInt8[np.ndarray, "E blocks {width}"]:
    """Returns the scales that belong to `words_of`, of a file's scales: [E, rows / BLOCK, width], at least 1."""
    num_experts, num_columns, groups = scales.shape
    padded_scales = np.ones((num_experts, rows // BLOCK, width), np.uint8)
    padded_scales[:, :groups, :num_columns] = np.maximum(np.swapaxes(scales, 1, 2), 1)
    return padded_scales


def dequantised(
    blocks: UInt8[np.ndarray, "E *batch groups 16"], scales: UInt8[np.ndarray, "E *batch groups"], dtype: DTypeLike
) -> np.ndarray:
    """Returns the values [E, *batch, groups * 32] of a file's blocks, on the host, one expert after the other.

    bfloat16 holds every value exactly. A subnormal number of float32 or bfloat16 stays one.
    """
    table = np.concatenate([VALUES, -VALUES])
    values = np.empty((*scales.shape, BLOCK), jnp.dtype(dtype))
    for expert, block, scale in zip(values, blocks, scales, strict=True):
        factor = np.ldexp(np.float32(1), scale.astype(np.int32) - 127)[..., None]
        expert[..., 0::2] = table[block & 15] * factor
        expert[..., 1::2] = table[block >> 4] * factor
    return values.reshape(*scales.shape[:-1], -1)
