"""Defines the question and the parts of its answer that every family of the corpus returns."""

import dataclasses
import random
from collections.abc import Sequence

NAMES = ("Ann", "Ben", "Tom", "Mia", "Sam", "Eva", "Leo", "Zoe")
THINGS = ("cups", "pens", "keys", "eggs", "books", "cards", "coins", "apples")
COLORS = ("red", "blue", "green", "black", "white")


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Holds a question and its answer; `steps` are always thought, `plan` from medium effort, `check` at high."""

    question: str
    plan: str
    steps: str
    check: str
    answer: str


def worded(rng: random.Random, forms: Sequence[tuple[str, str]], **slots: object) -> tuple[str, str]:
    """Returns a question and its answer: one form is drawn, and its slots are filled."""
    question, answer = rng.choice(forms)
    return question.format(**slots), answer.format(**slots)


def listed(items: Sequence[object]) -> str:
    """Returns the items as text, separated by commas: `3, 5, 8`."""
    return ", ".join(str(item) for item in items)


def numbered(items: Sequence[object]) -> str:
    """Returns the items as text, each after its number: `1 red, 2 blue`."""
    return listed(with_numbers(items))


def with_numbers(items: Sequence[object]) -> list[str]:
    """Returns each item after its number: `1 red` and `2 blue`."""
    return [f"{number} {item}" for number, item in enumerate(items, start=1)]
