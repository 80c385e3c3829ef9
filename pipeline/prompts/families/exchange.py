"""A question with everything its answer is made of; every family of the corpus returns one."""

import dataclasses
import random
from collections.abc import Sequence

NAMES = ("Ann", "Ben", "Tom", "Mia", "Sam", "Eva", "Leo", "Zoe")
THINGS = ("cups", "pens", "keys", "eggs", "books", "cards", "coins", "apples")
COLORS = ("red", "blue", "green", "black", "white")


@dataclasses.dataclass(frozen=True)
class Exchange:
    """`steps` are always thought, `plan` from medium effort on, `check` at high effort."""

    question: str
    plan: str
    steps: str
    check: str
    answer: str


def worded(rng: random.Random, forms: Sequence[tuple[str, str]], **slots: object) -> tuple[str, str]:
    """Pick one (question, answer) form and fill its slots: the answer's wording follows the question's."""
    question, answer = rng.choice(forms)
    return question.format(**slots), answer.format(**slots)


def listed(items: Sequence[object]) -> str:
    """`3, 5, 8`"""
    return ", ".join(str(item) for item in items)
