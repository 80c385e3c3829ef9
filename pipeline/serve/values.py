"""Checks single values of a request's body."""

from collections.abc import Mapping
from typing import Any

from pipeline.serve.errors import ApiError


def shown(value: Any) -> str:
    """Returns a value of a body as an error names it, in ASCII and cut where it is long."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def flag(values: Mapping[str, Any], key: str) -> bool:
    """Returns a value that is true or false, false where it is left out; raises ApiError for any other."""
    value = values.get(key)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise ApiError(f"{key} is {shown(value)}; wanted true or false", param=key)
    return value


def is_integer(value: Any) -> bool:
    """Returns whether a value is a whole number, which true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)
