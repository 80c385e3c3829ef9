"""What form an answer's text may be asked to have, as the right side of a rule in llguidance's dialect of Lark."""

import json
from collections.abc import Sequence
from typing import Any

WHITESPACE = "[ \\n\\r\\t]{0,32}"  # between JSON's parts: models that see no end write spaces for ever


def json_form(schema: Any) -> str:
    """Returns the form of the JSON texts of a schema."""
    if isinstance(schema, dict):
        schema = {"x-guidance": {"whitespace_pattern": WHITESPACE}, **schema}
    return f"%json {json.dumps(schema)}"


def regex_form(pattern: str) -> str:
    """Returns the form of the texts that a regular expression matches whole."""
    escaped, is_quoted = [], False
    for character in pattern:
        escaped.append("\\/" if character == "/" and not is_quoted else "\\n" if character == "\n" else character)
        is_quoted = character == "\\" and not is_quoted
    return f"/{''.join(escaped)}/"


def choice_form(texts: Sequence[str]) -> str:
    """Returns the form of some texts alone."""
    return " | ".join(json.dumps(text) for text in texts)


def grammar_form(grammar: str) -> str:
    """Returns the form of the texts of a Lark grammar, which begins at its rule `start`."""
    return f"%lark {{\n{grammar}\n}}"
