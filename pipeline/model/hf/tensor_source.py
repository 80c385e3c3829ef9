"""Where one of our arrays is in a checkpoint's files."""

import dataclasses
from collections.abc import Callable

import numpy as np

from pipeline.model.hf.safetensors_files import Index


@dataclasses.dataclass(frozen=True)
class Source:
    """The tensors an array is made from, and how a part of it is.

    `pick` gives the part of the files' tensors that a part of our array needs, in the same number of slices as they
    have axes or fewer; None where the whole is read. `arrange` makes our part of what was read, or the whole array.
    """

    names: tuple[str, ...]
    pick: Callable[[Index], Index] | None
    arrange: Callable[..., np.ndarray]


def unchanged(name: str) -> Source:
    """A tensor that lies as ours does."""
    return Source((name,), lambda index: index, lambda array, _: array)


def transposed(name: str) -> Source:
    """A matrix whose axes are swapped in the file."""
    return Source((name,), lambda index: index[::-1], lambda array, _: array.T)
