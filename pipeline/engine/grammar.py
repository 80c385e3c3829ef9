"""What may follow in a constrained answer, as the engine asks for it; grammars implement it."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Constraint(Protocol):
    """Knows what may follow in one answer, whose tokens it is given in order."""

    def advance(self, token_ids: Sequence[int]) -> None:
        """Takes the next tokens of the answer, which are certain."""

    def fill(self, drafted: Sequence[int], masks: np.ndarray) -> list[int]:
        """Writes which tokens may follow the answer so far, and each of the drafted tokens behind it.

        `masks` is uint32 [at least len(drafted) + 1, words]; rows behind a drafted token that may not stand where it
        does have no meaning. Returns the drafted tokens, changed where what must follow is known.
        """


@runtime_checkable
class Grammar(Protocol):
    """Can be started for any number of answers; other hosts make the same one of its `text`."""

    text: str

    def start(self) -> Constraint:
        """Returns the constraint of an answer that begins."""
