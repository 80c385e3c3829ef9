"""Writes safetensors files whose tensors are computed part by part, so that no whole tensor is in memory.

Source: github.com/huggingface/safetensors, "Format": the length of the header as eight bytes, the header as JSON,
then the tensors' bytes end to end. Like its library, the widest numbers come first, so that all are aligned.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from pipeline.artifacts.files import write_json
from pipeline.model.hf.safetensors_files import WEIGHTS_FILE

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "U8": np.uint8}
_ALIGNMENT = 8


@dataclasses.dataclass(frozen=True)
class Streamed:
    """Describes a tensor that is written; `parts` begins anew with each call and yields its numbers in order."""

    kind: str
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[np.ndarray]]

    @property
    def num_bytes(self) -> int:
        """The number of bytes in the file."""
        return math.prod(self.shape) * np.dtype(DTYPES[self.kind]).itemsize


def shard_names(count: int) -> list[str]:
    """Returns the names of `count` files, as transformers has them."""
    stem, suffix = WEIGHTS_FILE.split(".")
    return [f"{stem}-{number:05}-of-{count:05}.{suffix}" for number in range(1, count + 1)]


def write(file: Path, tensors: Mapping[str, Streamed], on_bytes: Callable[[int], None]) -> None:
    """Writes one file, which is whole or absent; `on_bytes` is called with the size of every part."""
    order = sorted(tensors, key=lambda name: (-np.dtype(DTYPES[tensors[name].kind]).itemsize, name))
    scratch = file.with_name(f"{file.name}.tmp")
    with open(scratch, "wb") as opened:
        opened.write(_header({name: tensors[name] for name in order}))
        for name in order:
            start = opened.tell()
            for part in tensors[name].parts():
                array = np.ascontiguousarray(part, DTYPES[tensors[name].kind])
                opened.write(array.reshape(-1).view(np.uint8).data)
                on_bytes(array.nbytes)
            assert opened.tell() - start == tensors[name].num_bytes, name
        opened.flush()
        os.fsync(opened.fileno())
    os.rename(scratch, file)


def write_index(directory: Path, shards: Mapping[str, Mapping[str, Streamed]]) -> None:
    """Writes the index of the files of a directory."""
    total = sum(tensor.num_bytes for tensors in shards.values() for tensor in tensors.values())
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(directory / f"{WEIGHTS_FILE}.index.json", index)


def _header(tensors: Mapping[str, Streamed]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in tensors.items():
        stop = start + tensor.num_bytes
        entries[name] = {"dtype": tensor.kind, "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
