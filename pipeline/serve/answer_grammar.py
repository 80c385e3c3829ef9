"""Writes the grammar of a whole answer in a chat format, in llguidance's dialect of Lark.

A form is what the text of an answer must be, as the right side of a rule (`forms.py`). In Harmony the analysis stays
free, the final text has the form, and calls have the arguments that their functions take.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.prompts.harmony import CONSTRAIN
from pipeline.serve.forms import json_form

ANY_TEXT = "/(?s:.*)/"  # without control tokens
ANY_OBJECT = json_form({"type": "object"})


def plain_grammar(form: str, stop_token_ids: Iterable[int]) -> str:
    """Returns the grammar of an answer that is a form and a stop token."""
    return f"start: form ({_tokens(stop_token_ids)})\nform: {form}\n"


def harmony_grammar(form: str | None, tools: Sequence[Mapping[str, Any]]) -> str:
    """Returns the grammar of an answer in Harmony: messages, then a final text of a form (None: any) or a call."""
    ends = "final | call" if tools else "final"
    return (
        f"start: message* ({ends})\n"
        f'message: <|channel|> ("analysis" | "commentary") <|message|> TEXT <|end|> <|start|> "assistant"\n'
        f'final: <|channel|> "final" (" "? {CONSTRAIN} "json")? <|message|> form <|return|>\n'
        f"form: {form or 'TEXT'}\n"
        f"TEXT: {ANY_TEXT}\n"
    ) + (f'call: <|channel|> "commentary to=functions" function\n{_functions(tools, "TEXT")}' if tools else "")


def call_grammar(tools: Sequence[Mapping[str, Any]], *, is_named: bool, with_schemas: bool) -> str:
    """Returns the grammar of what follows where an answer has begun to call a function, which it may have named.

    Arguments are a JSON object, `with_schemas` one that the function takes; those of a strict function always are.
    """
    if not is_named:
        return f"start: function\n{_functions(tools, ANY_OBJECT, with_schemas)}"
    (tool,) = tools
    return f"start: arguments <|call|>\narguments: {_arguments(tool, ANY_OBJECT, with_schemas)}\n"


def is_strict(tool: Mapping[str, Any]) -> bool:
    """Returns whether a function's calls must have the arguments that it takes."""
    return tool["function"].get("strict") is True


def _functions(tools: Sequence[Mapping[str, Any]], others: str, with_schemas: bool = False) -> str:
    """Returns the rules of the names of functions, each with its arguments."""
    headers = [f'{json.dumps("." + tool["function"]["name"])} " " {CONSTRAIN} "json" <|message|>' for tool in tools]
    calls = " | ".join(f"({header} arguments{index} <|call|>)" for index, header in enumerate(headers))
    rules = [f"arguments{index}: {_arguments(tool, others, with_schemas)}\n" for index, tool in enumerate(tools)]
    return f"function: {calls}\n" + "".join(rules)


def _arguments(tool: Mapping[str, Any], others: str, with_schemas: bool) -> str:
    """Returns the form of a function's arguments: by its schema where it is strict or all are to be, else `others`."""
    if not (with_schemas or is_strict(tool)):
        return others
    return json_form(tool["function"].get("parameters") or {"type": "object", "properties": {}})


def _tokens(token_ids: Iterable[int]) -> str:
    return " | ".join(f"<[{token}]>" for token in token_ids)
