"""Reads what a GGUF file says of itself: its metadata, and where each tensor lies.

The gguf package's own reader makes several arrays of every string, a gigabyte for GPT-OSS's tokens and merges, and
maps the whole file. Source: ggml's specification of GGUF, versions 2 and 3.
"""

import dataclasses
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pipeline.errors import PipelineError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9
_ALIGNMENT, _DEFAULT_ALIGNMENT = "general.alignment", 32
_MAX_DIMENSIONS = 8


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Describes a tensor: its shape with the longest stride first, the number of its kind, and where it begins."""

    shape: tuple[int, ...]
    kind: int
    offset: int


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Returns the metadata and the tensors of one file; raises PipelineError when it is no GGUF or cut off."""
    try:
        with open(path, "rb") as opened:
            return _Reader(opened, path.stat().st_size).header()
    except (OSError, ValueError) as error:
        raise PipelineError(f"{path} cannot be read as GGUF ({error}); give a whole GGUF file") from error


class _Reader:
    """Reads numbers and strings in order; raises ValueError where the file ends or does not follow the format."""

    def __init__(self, opened: BinaryIO, size: int) -> None:
        self._opened = opened
        self._left = size

    def header(self) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        if self._bytes(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self._number("<I")
        if version not in VERSIONS:
            other = " in the byte order of another machine" if version & 0xFFFF == 0 else ""
            raise ValueError(f"it has version {version}{other}; known are 2 and 3")
        num_tensors, num_values = self._number("<Q"), self._number("<Q")
        values: dict[str, Any] = {}
        for _ in range(num_values):
            _add(values, self._string(), self._value(self._number("<I")))
        infos: dict[str, TensorInfo] = {}
        for _ in range(num_tensors):
            _add(infos, self._string(), self._info())
        alignment = values.get(_ALIGNMENT, _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"{_ALIGNMENT} is {alignment!r}")
        begin = -(-self._opened.tell() // alignment) * alignment
        return values, {name: dataclasses.replace(info, offset=begin + info.offset) for name, info in infos.items()}

    def _info(self) -> TensorInfo:
        num_dimensions = self._number("<I")
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise ValueError(f"a tensor has {num_dimensions} dimensions")
        sizes = [self._number("<Q") for _ in range(num_dimensions)]
        return TensorInfo(tuple(reversed(sizes)), self._number("<I"), self._number("<Q"))

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            of, count = self._number("<I"), self._number("<Q")
            if of in _SCALARS:
                return self._scalars(of, count)
            if count > self._left:
                raise ValueError("it ends within a list")
            return [self._value(of) for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"a value is of kind {kind}")
        return self._scalars(kind, 1)[0]

    def _scalars(self, kind: int, count: int) -> list[Any]:
        dtype = np.dtype(_SCALARS[kind])
        return list(np.frombuffer(self._bytes(count * dtype.itemsize), dtype).tolist())

    def _string(self) -> str:
        return self._bytes(self._number("<Q")).decode()

    def _number(self, layout: str) -> int:
        return int(struct.unpack(layout, self._bytes(struct.calcsize(layout)))[0])

    def _bytes(self, count: int) -> bytes:
        if count > self._left:
            raise ValueError("it ends within its header")
        self._left -= count
        return self._opened.read(count)


def _add(found: dict[str, Any], name: str, value: Any) -> None:
    if name in found:
        raise ValueError(f"it has {name} twice")
    found[name] = value
