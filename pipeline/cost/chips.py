"""What accelerators can do: bytes of memory, bytes a second from it, bfloat16 operations a second."""

import dataclasses

from pipeline.progress import GIB


@dataclasses.dataclass(frozen=True)
class Chip:
    """Holds what a chip has: bytes of HBM, bytes a second from it, and bfloat16 operations a second.

    Source: cloud.google.com/tpu/docs, the pages of v5e, v5p, v6e and TPU7x (system architecture); NVIDIA's data sheets
    of A100, H100, H200 (SXM) and HGX B200, and AMD's of the MI300X, all without sparsity.
    """

    hbm_bytes: int
    bytes_per_second: float
    flops_per_second: float


CHIPS = {
    "v5e": Chip(16 * GIB, 819e9, 197e12),
    "v5p": Chip(95 * GIB, 2765e9, 459e12),
    "v6e": Chip(32 * GIB, 1640e9, 918e12),
    "v7x": Chip(192 * GIB, 7380e9, 2307e12),
    "a100": Chip(80 * GIB, 2039e9, 312e12),
    "h100": Chip(80 * GIB, 3350e9, 989e12),
    "h200": Chip(141 * GIB, 4800e9, 989e12),
    "b200": Chip(180 * GIB, 8000e9, 2250e12),
    "mi300x": Chip(192 * GIB, 5300e9, 1307e12),
}
# a part of JAX's `device_kind` -> the chip's name in CHIPS
NAME_OF_KIND = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5p": "v5p",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "v7x",
    "B200": "b200",
    "MI300X": "mi300x",
    "H200": "h200",
    "H100": "h100",
    "A100": "a100",
}


def chip_of(device_kind: str) -> Chip | None:
    """Returns the chip that JAX's `device_kind` names; None for one that is not listed, such as a CPU."""
    names = [name for kind, name in NAME_OF_KIND.items() if kind in device_kind]
    return CHIPS[names[0]] if names else None
