"""Reads the safetensors files of a directory: whole tensors as views of the files, and parts of experts.

A tensor is mapped into memory and read where it is needed, so that a host reads its own devices' parts and no more.
"""

import json
import struct
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "U8": np.uint8}
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)  # E2M1
SCALE_BIAS = 127  # of a block's exponent (E8M0)

Index = tuple[slice, ...]
Reader = Callable[[Index], np.ndarray]  # a part of an array


class Checkpoint:
    """Holds the tensors of a directory by name. Raises ValueError when it has none."""

    def __init__(self, directory: str) -> None:
        self._directory = Path(directory)
        self._tensors: dict[str, np.ndarray] = {}
        for file in sorted(self._directory.glob("*.safetensors")):
            self._tensors |= _tensors_of(file)
        if not self._tensors:
            raise ValueError(f"{directory} has no *.safetensors files")

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def require(self, names: Iterable[str]) -> None:
        """Raises ValueError when a tensor is missing."""
        missing = sorted(set(names) - self._tensors.keys())
        if missing:
            raise ValueError(f"{self._directory} lacks {len(missing)} tensors that the model has: {missing[:5]}")

    def tensor(self, name: str) -> np.ndarray:
        """Returns a view of a tensor's file; raises ValueError when it is missing."""
        self.require([name])
        return self._tensors[name]


def _tensors_of(file: Path) -> dict[str, np.ndarray]:
    with open(file, "rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
    data = np.memmap(file, np.uint8, mode="r", offset=8 + length)
    found = {}
    for name, about in header.items():
        if name == "__metadata__":
            continue
        if about["dtype"] not in DTYPES:
            raise ValueError(f"{file}: {name} is {about['dtype']}; wanted one of {sorted(DTYPES)}")
        begin, end = about["data_offsets"]
        found[name] = data[begin:end].view(DTYPES[about["dtype"]]).reshape(about["shape"])
    return found


def placed(shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding, read: Reader) -> jax.Array:
    """Returns an array of which every device reads its own part."""
    return jax.make_array_from_callback(shape, sharding, lambda index: np.ascontiguousarray(read(index), dtype))


def expert_reader(checkpoint: Checkpoint, prefix: str, part: str, width: int) -> Reader:
    """Returns the reader of all experts' matrices of a layer: gate and up [E, D, F], down [E, F, D].

    `part` is "gate", "up" or "down" and `width` the length of the axis that is multiplied, D or F. Gate and up are
    every other of the file's columns. They are stored as floats [E, in, out], or as MXFP4, which is packed along the
    axis that is multiplied: `_blocks` [E, out, in / 32, 16] of two values a byte, and `_scales` [E, out, in / 32].
    """
    name = f"{prefix}.down_proj" if part == "down" else f"{prefix}.gate_up_proj"
    if name in checkpoint:
        stored = checkpoint.tensor(name)
        return lambda index: stored[index[0], index[1], _columns(index[2], part)]
    blocks, scales = checkpoint.tensor(f"{name}_blocks"), checkpoint.tensor(f"{name}_scales")

    def read(index: Index) -> np.ndarray:
        experts, rows, columns = index[0], index[1], _columns(index[2], part)
        unpacked = unpack_mxfp4(blocks[experts, columns], scales[experts, columns])[..., :width]
        return unpacked[..., rows].swapaxes(1, 2)

    return read


def bias_reader(checkpoint: Checkpoint, prefix: str, part: str) -> Reader:
    """Returns the reader of all experts' biases of a layer, [E, F] or [E, D]."""
    name = f"{prefix}.down_proj_bias" if part == "down" else f"{prefix}.gate_up_proj_bias"
    stored = checkpoint.tensor(name)
    return lambda index: stored[index[0], _columns(index[1], part)]


def _columns(index: slice, part: str) -> slice:
    """Returns where the columns of a part are in the file: gate's are the even ones, up's the odd ones."""
    if part == "down":
        return index
    first = 0 if part == "gate" else 1
    start, stop = index.start or 0, index.stop
    return slice(2 * start + first, None if stop is None else 2 * stop, 2)


def unpack_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Returns the values [..., 32 B] of blocks [..., B, 16], low halves of bytes first, times 2 ** (scale - 127)."""
    pairs = np.stack([FP4[blocks & 0x0F], FP4[blocks >> 4]], axis=-1).reshape(*blocks.shape[:-1], -1)
    scaled = np.ldexp(pairs, scales.astype(np.int32)[..., None] - SCALE_BIAS)
    return scaled.reshape(*blocks.shape[:-2], -1)
