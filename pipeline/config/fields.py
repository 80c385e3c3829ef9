"""How a field of the schema is declared: its default, its rule, and which artifacts' bytes it decides."""

import dataclasses
import datetime
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

# the artifacts that have a key, in the order in which they are made
TARGET, TEACHER_CACHE, CHECKPOINT, DRAFT = "target", "teacher_cache", "checkpoint", "draft"

ALWAYS = object()  # the `unset` of fields that are as old as keys are: they count with any value


@dataclasses.dataclass(frozen=True)
class Rule:
    """Says what a value must be: `holds` tests it, `text` ends the sentence "it must be ..."."""

    text: str
    holds: Callable[[Any], bool]


@dataclasses.dataclass(frozen=True)
class Declaration:
    """Holds what a field declares besides its default."""

    rule: Rule | None
    kinds: tuple[str, ...]
    unset: Any
    is_path: bool


DECLARATION = "declaration"  # the field's metadata key


def setting(
    default: Any,
    *,
    key: str | tuple[str, ...] | None,
    rule: Rule | None = None,
    unset: Any = ALWAYS,
    factory: bool = False,
    is_path: bool = False,
) -> Any:
    """Declares a field of the schema.

    `default` is its value, or with `factory` what makes one. `key` names the artifacts whose bytes the field decides,
    None for paths, ports, logs and whatever else decides none. `unset` is the value that reproduces what the program
    did before the field existed: with it the field is left out of keys, so that a new field orphans no artifact. It is
    written once, with the field, and never changed. `rule` is checked unless the value is None. In a path `~` is the
    home directory.
    """
    kinds = (key,) if isinstance(key, str) else (key or ())
    metadata = {DECLARATION: Declaration(rule, kinds, unset, is_path)}
    if factory:
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def group(schema: type) -> Any:
    """Declares a nested group of fields, which has no declaration of its own."""
    return dataclasses.field(default_factory=schema)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Holds one value of a configuration, with its dotted name and its declaration."""

    name: str
    value: Any
    declaration: Declaration


def leaves(config: Any, prefix: str = "") -> list[Leaf]:
    """Returns every value of a configuration, in the order of the schema; groups that are None have none."""
    found = []
    for field in dataclasses.fields(config):
        name, value = f"{prefix}{field.name}", getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found += leaves(value, f"{name}.")
        elif DECLARATION in field.metadata:
            found.append(Leaf(name, value, field.metadata[DECLARATION]))
    return found


def expand_paths(config: Any) -> Any:
    """Returns the configuration with `~` at the beginning of paths expanded."""
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            changed[field.name] = expand_paths(value)
        elif value is not None and DECLARATION in field.metadata and field.metadata[DECLARATION].is_path:
            changed[field.name] = str(Path(value).expanduser()) if value.startswith("~") else value
    return dataclasses.replace(config, **changed)


def _is_day(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


positive = Rule("positive", lambda value: value > 0)
not_negative = Rule("0 or more", lambda value: value >= 0 and value < math.inf)
share = Rule("from 0 to 1", lambda value: 0 <= value <= 1)
positive_share = Rule("above 0 and at most 1", lambda value: 0 < value <= 1)
proper_fraction = Rule("between 0 and 1", lambda value: 0 < value < 1)
below_one = Rule("at least 0 and below 1", lambda value: 0 <= value < 1)
even = Rule("even and positive, as rotary embedding needs it", lambda value: value > 0 and value % 2 == 0)
port = Rule("from 0 to 65535", lambda value: 0 <= value < 65536)
day = Rule("a day such as 2025-08-05", _is_day)
sha256 = Rule("64 hex digits in lower case", lambda value: re.fullmatch("[0-9a-f]{64}", value) is not None)
plain_name = Rule(
    "a plain name of letters, digits, dots, hyphens and underscores",
    lambda value: re.fullmatch(r"[A-Za-z0-9][\w.-]*", value) is not None,
)
all_positive = Rule("a list of positive numbers", lambda value: bool(value) and all(number > 0 for number in value))
texts = Rule("a list of texts that are not empty", lambda value: bool(value) and all(text.strip() for text in value))
none_or_positive = Rule("a list of positive numbers, or empty", lambda value: all(number > 0 for number in value))
ascending = Rule(
    "layer ids that ascend without repeats", lambda value: bool(value) and sorted(set(value)) == list(value)
)
path_text = Rule("a path; . is the directory you are in", lambda value: bool(value.strip()))


page_size = Rule("16, 32, 64 or 128", lambda value: value in (16, 32, 64, 128))


def at_least(smallest: int, why: str) -> Rule:
    """Returns the rule that a number is `smallest` or more, with the reason."""
    return Rule(f"at least {smallest}: {why}", lambda value: value >= smallest)
