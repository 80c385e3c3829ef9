"""The safetensors files of an HF directory: lists their tensors, reads parts of them on demand, and writes them."""

import dataclasses
import json
import stat
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pipeline.errors import PipelineError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOAT_KINDS = ("F32", "BF16", "F16")
BYTE_KINDS = ("U8",)

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Expected:
    """Holds what a tensor must be: its shape, and the names that the file format may have for its kind of number."""

    shape: tuple[int, ...]
    kinds: tuple[str, ...] = FLOAT_KINDS


@dataclasses.dataclass(frozen=True)
class _Entry:
    file: Path
    shape: tuple[int, ...]
    kind: str


class TensorFiles:
    """Reads the tensors of a directory's files.

    Files are open only while they are read, for a mapped file counts as memory of this process. Raises PipelineError
    when a file is missing or damaged.
    """

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
        """The name of every tensor."""
        return set(self._entries)

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """Returns a tensor, or the part of it at `index`."""
        with safe_open(self._entries[name].file, framework="numpy") as opened:
            if index is None:
                return opened.get_tensor(name)
            if all(part.start < part.stop for part in index):
                return opened.get_slice(name)[index]
            first = opened.get_slice(name)[tuple(slice(0, 1) for _ in index)]  # it would refuse an empty part
            return np.zeros((*(part.stop - part.start for part in index), *first.shape[len(index) :]), first.dtype)

    def differences(self, expected: Mapping[str, Expected]) -> dict[str, str]:
        """Returns the problem of every tensor that has one: unexpected, missing, another shape or kind of number."""
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
    """Returns the files that hold the weights of an HF directory: one file, or those that its index names.

    Raises PipelineError when a file is missing or the index cannot be read.
    """
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
    """Writes tensors as one file, with the mode that the umask gives."""
    file = directory / WEIGHTS_FILE
    file.touch()  # save_file replaces it by a file of mode 0600, which other users could not read
    mode = stat.S_IMODE(file.stat().st_mode)
    # safetensors would write a transposed view's bytes in the wrong order
    whole = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    save_file(whole, file, metadata={"format": "pt"})
    file.chmod(mode)
