"""What kernels on a TPU know of its memory."""

from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

VMEM_BYTES = 48 * 2**20  # a kernel's share; every chip since v5e has at least 64 MiB
ROW_TILE = 16  # rows of bfloat16 in a register


def in_hbm(array: Array, *, interpret: bool) -> Array:
    """Returns an array where it is: XLA would copy one that fits into VMEM as a whole, what is not read included."""
    return array if interpret else pltpu.with_memory_space_constraint(array, pltpu.HBM)
