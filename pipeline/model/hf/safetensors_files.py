"""The safetensors files of an HF directory: what is in them, and any part of any tensor, read when it is asked for."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pipeline.errors import PipelineError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOATS = ("F32", "BF16", "F16")
BYTES = ("U8",)

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a tensor must be: its shape, and one of the file format's names for its kind of number."""

    shape: tuple[int, ...]
    kinds: tuple[str, ...] = FLOATS


@dataclasses.dataclass(frozen=True)
class _Entry:
    file: Path
    shape: tuple[int, ...]
    kind: str


class TensorFiles:
    """Opens a directory's files one at a time and only to read: a mapped file would count as memory of ours."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._entries: dict[str, _Entry] = {}
        try:
            for file in weight_files(directory):
                with safe_open(file, framework="numpy") as opened:
                    for name in opened.keys():  # noqa: SIM118 (not a mapping)
                        part = opened.get_slice(name)
                        self._entries[name] = _Entry(file, tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError) as error:
            raise PipelineError(f"{directory}: damaged safetensors file ({error}); copy it again") from error

    @property
    def names(self) -> set[str]:
        """Every tensor's name."""
        return set(self._entries)

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """A tensor, or the part of it at `index`."""
        with safe_open(self._entries[name].file, framework="numpy") as opened:
            if index is None:
                return opened.get_tensor(name)
            if all(one.start < one.stop for one in index):
                return opened.get_slice(name)[index]
            some = opened.get_slice(name)[tuple(slice(0, 1) for _ in index)]  # it would refuse an empty part
            return np.zeros((*(one.stop - one.start for one in index), *some.shape[len(index) :]), some.dtype)

    def differences(self, expected: Mapping[str, Expected]) -> dict[str, str]:
        """What is wrong with which tensor: unexpected, missing, another shape or kind of number."""
        wrong = dict.fromkeys(sorted(self.names - expected.keys()), "unexpected")
        for name, wanted in expected.items():
            found = self._entries.get(name)
            if found is None:
                wrong[name] = "missing"
            elif found.shape != wanted.shape:
                wrong[name] = f"shape {list(found.shape)}, wanted {list(wanted.shape)}"
            elif found.kind not in wanted.kinds:
                wrong[name] = f"holds {found.kind}, wanted {' or '.join(wanted.kinds)}"
        return wrong


def weight_files(directory: Path) -> list[Path]:
    """The files that hold the weights of an HF directory, one or those of its index; PipelineError when one lacks."""
    index = directory / INDEX_FILE
    try:
        weight_map = json.loads(index.read_text())["weight_map"] if index.is_file() else {"": WEIGHTS_FILE}
    except (json.JSONDecodeError, KeyError) as error:
        raise PipelineError(f"{index} has no readable weight_map ({error}); copy it again") from error
    names = sorted(set(weight_map.values()))
    absent = [name for name in names if not (directory / name).is_file()]
    if absent:
        raise PipelineError(f"{directory} lacks {', '.join(absent)}; copy the whole HF checkpoint")
    return [directory / name for name in names]


def write(directory: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write tensors as one file."""
    # safetensors would write a transposed view's bytes in the wrong order
    whole = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    save_file(whole, directory / WEIGHTS_FILE, metadata={"format": "pt"})
