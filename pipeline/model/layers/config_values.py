"""Tells what kind of number a value of a `config.json` is; JSON's true and false are none, though Python's are."""

from typing import Any


def is_whole(value: Any) -> bool:
    """Returns whether a value is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Returns whether a value is a number, whole or not."""
    return is_whole(value) or isinstance(value, float)
