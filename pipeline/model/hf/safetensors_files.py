"""The safetensors files of an HF directory: lists their tensors, reads parts of them on demand, and writes them."""

import dataclasses
import functools
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pipeline.errors import PipelineError
from pipeline.model.hf.json_files import read_object

WEIGHTS_FILE = "model.safetensors"
FLOAT_KINDS = ("F32", "BF16", "F16")
BYTE_KINDS = ("U8",)

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Expected:
    """Holds what a tensor must be: its shape, and the names that the file format may have for its kind of number."""

    shape: tuple[int, ...]
    kinds: tuple[str, ...] = FLOAT_KINDS


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Describes a tensor; `read` returns the part at an index that has a slice, with both bounds, for every axis."""

    shape: tuple[int, ...]
    kind: str
    read: Callable[[Index], np.ndarray]

    @property
    def whole(self) -> Index:
        """The index of all of it."""
        return tuple(slice(0, size) for size in self.shape)


class TensorFiles:
    """Reads the tensors of a directory: those of its files, or others that are computed from them.

    Files are open only while they are read, for a mapped file counts as memory of this process. Raises PipelineError
    when a file is missing or damaged.
    """

    def __init__(self, directory: Path, tensors: Mapping[str, Tensor] | None = None) -> None:
        self.directory = directory
        self.tensors = dict(stored(directory, weight_files(directory)) if tensors is None else tensors)

    @property
    def names(self) -> set[str]:
        """The name of every tensor."""
        return set(self.tensors)

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """Returns a tensor, or the part of it at `index`, which may leave out the last axes."""
        tensor, leading = self.tensors[name], index or ()
        return tensor.read((*leading, *tensor.whole[len(leading) :]))

    def differences(self, expected: Mapping[str, Expected]) -> dict[str, str]:
        """Returns the problem of every tensor that has one: unexpected, missing, another shape or kind of number."""
        wrong = dict.fromkeys(sorted(self.names - expected.keys()), "unexpected")
        for name, wanted in expected.items():
            found = self.tensors.get(name)
            if found is None:
                wrong[name] = "missing"
            elif found.shape != wanted.shape:
                wrong[name] = f"shape {list(found.shape)}, wanted {list(wanted.shape)}"
            elif found.kind not in wanted.kinds:
                wrong[name] = f"holds {found.kind}, wanted {' or '.join(wanted.kinds)}"
        return wrong


def stored(directory: Path, files: Sequence[Path]) -> dict[str, Tensor]:
    """Returns the tensors that files hold, by name."""
    tensors: dict[str, Tensor] = {}
    try:
        for file in files:
            with safe_open(file, framework="numpy") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a mapping)
                    part = opened.get_slice(name)
                    shape = tuple(part.get_shape())
                    tensors[name] = Tensor(shape, part.get_dtype(), functools.partial(_read, file, name, shape))
    except (SafetensorError, OSError) as error:
        raise PipelineError(f"{directory}: damaged safetensors file ({error}); copy it again") from error
    return tensors


def _read(file: Path, name: str, shape: tuple[int, ...], index: Index) -> np.ndarray:
    sizes = tuple(part.stop - part.start for part in index)
    with safe_open(file, framework="numpy") as opened:
        if sizes == shape:
            return opened.get_tensor(name)
        if all(sizes):
            return opened.get_slice(name)[index]
        first = opened.get_slice(name)[tuple(slice(0, 1) for _ in index)]  # it would refuse an empty part
        return np.zeros(sizes, first.dtype)


def weight_files(directory: Path, single: str = WEIGHTS_FILE) -> list[Path]:
    """Returns the files that hold the weights of an HF directory: the `single` one, or those that its index names.

    Raises PipelineError when a file is missing, the index cannot be read, or both are there and differ: transformers
    takes the single file, other readers take the index.
    """
    index = directory / f"{single}.index.json"
    weight_map = read_object(index, "copy it again").get("weight_map") if index.is_file() else {"": single}
    files = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not files or not all(isinstance(name, str) and name and name == Path(name).name for name in files):
        raise PipelineError(f"{index} has no weight_map from tensors to files beside it; copy it again")
    names = sorted(set(files))
    if single not in names and (directory / single).is_file():
        raise PipelineError(
            f"{directory} holds the weights twice: {single}, and {index.name} with {', '.join(names)}; "
            "runtimes do not agree which ones they read: delete those that are not meant"
        )
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
