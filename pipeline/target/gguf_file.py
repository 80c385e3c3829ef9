"""Reads GGUF files: metadata, and tensors part by part. Nothing else imports the `gguf` package."""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from jaxtyping import Float, UInt8

from pipeline.errors import PipelineError
from pipeline.target.gguf_header import read_header
from pipeline.workspace.gguf_parts import parts_of

MXFP4_BYTES = 17  # of a block of 32 values: a scale and 16 bytes
READ_ELEMENTS = 2**22  # at a time, of tensors that are read in parts of any size
_PARTS, _PART = "split.count", "split.no"
_PLAIN = {Kind.F32: np.float32, Kind.F16: np.float16, Kind.BF16: ml_dtypes.bfloat16}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Describes a tensor of a GGUF file: how it is quantised, its shape with rows last, and its bytes in the file."""

    path: Path
    kind: Kind
    shape: tuple[int, ...]
    offset: int
    num_bytes: int

    @property
    def num_rows(self) -> int:
        """The number of rows, all axes but the last together."""
        return math.prod(self.shape[:-1])

    @property
    def is_quantised(self) -> bool:
        """Whether the file holds other numbers than float32, float16 or bfloat16."""
        return self.kind not in _PLAIN


class GgufFile:
    """Holds the metadata and the list of tensors of one GGUF file, or of all parts of a split one.

    Tensors are read on demand, and no file is mapped: mapped pages count as memory of this process.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        parts = parts_of(path)
        self._fields, self.tensors = _opened(parts[0])
        found = int(self._fields.get(_PARTS, 1))
        if found > 1 and len(parts) != found:
            raise PipelineError(
                f"{path} is one of {found} parts, and its name does not say which; give the first one by the name that "
                f"llama.cpp gave it, such as model-00001-of-{found:05}.gguf, with the others beside it"
            )
        for number, part in enumerate(parts):
            fields, tensors = (self._fields, self.tensors) if number == 0 else _opened(part)
            if len(parts) > 1 and (fields.get(_PARTS), fields.get(_PART)) != (len(parts), number):
                raise PipelineError(
                    f"{part}: found {_PART} {fields.get(_PART)} and {_PARTS} {fields.get(_PARTS)}, wanted {number} and "
                    f"{len(parts)}, as its name says; copy all parts again"
                )
            self.tensors |= tensors

    @property
    def num_weights(self) -> int:
        """Returns the number of elements of all tensors."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def tensor_names(self) -> frozenset[str]:
        """Returns the names of the file's tensors."""
        return frozenset(self.tensors)

    @property
    def architecture(self) -> str:
        """Returns the kind of model, as `general.architecture` names it."""
        return str(self.values(["general.architecture"])["general.architecture"])

    @property
    def keys(self) -> frozenset[str]:
        """Returns the keys of the metadata."""
        return frozenset(self._fields)

    def get(self, key: str, default: Any = None) -> Any:
        """Returns a value of the metadata, or `default` where there is none."""
        return self._fields.get(key, default)

    def values(self, keys: Iterable[str]) -> dict[str, Any]:
        """Returns metadata by key; raises PipelineError that names every missing key."""
        keys = list(keys)
        missing = [key for key in keys if key not in self._fields]
        if missing:
            raise PipelineError(f"{self.path} has no {', '.join(missing)}; give a GGUF that names them")
        return {key: self._fields[key] for key in keys}

    def tensor(self, name: str, shape: tuple[int, ...]) -> Float[np.ndarray, "..."]:
        """Returns a tensor in float32, matrices as [out, in]; raises PipelineError when it is missing or misshapen."""
        if name not in self.tensors:
            raise PipelineError(f"{self.path} has no tensor {name}; give a whole GGUF file")
        if self.tensors[name].shape != shape:
            raise PipelineError(f"{self.path}: {name} has shape {self.tensors[name].shape}, wanted {shape}")
        return self.rows(name).astype(np.float32).reshape(shape)  # F16 and BF16 files too

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Float[np.ndarray, "rows width"]:
        """Returns rows of a tensor, in the file's own precision, or in float32 where it is quantised.

        Raises PipelineError for a quantisation that the gguf package does not read.
        """
        tensor, raw = self.tensors[name], self._raw(name, start, stop)
        if tensor.kind in _PLAIN:
            return raw.view(_PLAIN[tensor.kind])
        try:
            return dequantize(raw, tensor.kind)
        except NotImplementedError as error:
            raise PipelineError(
                f"{self.path}: {name} is quantised as {tensor.kind.name}, which the gguf package does not "
                "read; give a file in another quantisation"
            ) from error

    def parts(self, name: str) -> Iterator[Float[np.ndarray, "rows width"]]:
        """Yields all rows of a tensor as `rows` does, READ_ELEMENTS or a row at a time."""
        tensor = self.tensors[name]
        step = max(1, READ_ELEMENTS // tensor.shape[-1])
        for start in range(0, tensor.num_rows, step):
            yield self.rows(name, start, min(start + step, tensor.num_rows))

    def blocks(self, name: str, start: int, stop: int) -> UInt8[np.ndarray, "rows groups 17"]:
        """Returns rows of a tensor in MXFP4 as they are stored: for 32 values a byte of scale, then 16 bytes."""
        assert self.tensors[name].kind is Kind.MXFP4, name
        return self._raw(name, start, stop).reshape(stop - start, -1, MXFP4_BYTES)

    def is_mxfp4(self, name: str) -> bool:
        """Returns whether a tensor is there in MXFP4."""
        return name in self.tensors and self.tensors[name].kind is Kind.MXFP4

    def _raw(self, name: str, start: int, stop: int | None) -> UInt8[np.ndarray, "rows bytes"]:
        tensor = self.tensors[name]
        count = (tensor.num_rows if stop is None else stop) - start
        row_bytes = tensor.num_bytes // tensor.num_rows
        raw = np.fromfile(tensor.path, np.uint8, count * row_bytes, offset=tensor.offset + start * row_bytes)
        if len(raw) != count * row_bytes:
            raise PipelineError(f"{tensor.path} became shorter while it was read; copy it again")
        return raw.reshape(count, row_bytes)


def _opened(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Returns the metadata and the tensors of one file."""
    fields, infos = read_header(path)
    size = path.stat().st_size
    tensors = {}
    for name, info in infos.items():
        if info.kind not in set(Kind):
            raise PipelineError(f"{path}: {name} is of kind {info.kind}, which the gguf package does not know")
        block, block_bytes = GGML_QUANT_SIZES[Kind(info.kind)]
        if info.shape[-1] % block:
            raise PipelineError(f"{path}: {name} has rows of {info.shape[-1]}, wanted a multiple of {block}")
        num_bytes = math.prod(info.shape) // block * block_bytes
        if info.offset + num_bytes > size:
            raise PipelineError(f"{path} cannot be read as GGUF (it ends before {name} does); give a whole GGUF file")
        tensors[name] = StoredTensor(path, Kind(info.kind), info.shape, info.offset, num_bytes)
    return fields, tensors
