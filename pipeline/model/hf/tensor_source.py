"""Where an array of our weights is in a checkpoint's files."""

import dataclasses
from collections.abc import Callable

import numpy as np

from pipeline.model.hf.safetensors_files import Index


@dataclasses.dataclass(frozen=True)
class Source:
    """Holds which tensors of the files an array is read from, and how any part of it is computed.

    `pick` maps the index of a part of the array to the index of the part of the tensors that it needs, with as many
    slices as the tensors have axes or fewer; None: they are read whole. `arrange` takes what was read and the index of
    the part; it returns that part, or the whole array where `pick` is None.
    """

    names: tuple[str, ...]
    pick: Callable[[Index], Index] | None
    arrange: Callable[..., np.ndarray]


def unchanged(name: str) -> Source:
    """Returns the source of an array that is stored as its tensor is."""
    return Source((name,), lambda index: index, lambda array, _: array)


def transposed(name: str) -> Source:
    """Returns the source of a matrix whose axes are swapped in the file."""
    return Source((name,), lambda index: index[::-1], lambda array, _: array.T)
