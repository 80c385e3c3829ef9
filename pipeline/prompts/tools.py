"""Defines the functions that a conversation offers to the model, and calls of them, in OpenAI's shape."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

NAME = re.compile(r"[A-Za-z0-9_.-]+")  # it is part of a header, where a space ends it


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """Holds a call of the function `name`; `arguments` is a JSON object as text, exactly as it was written."""

    name: str
    arguments: str

    def as_dict(self) -> dict[str, Any]:
        """Returns OpenAI's shape, without an id."""
        return {"type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclasses.dataclass(frozen=True)
class Tool:
    """Holds a function that may be called; `parameters` is a JSON Schema as text, None without parameters.

    The schema's order is preserved, because templates write properties in that order.
    """

    name: str
    description: str
    parameters: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Returns OpenAI's shape, which chat templates take too."""
        function: dict[str, Any] = {"name": self.name, "description": self.description}
        if self.parameters is not None:
            function["parameters"] = json.loads(self.parameters)
        return {"type": "function", "function": function}


def tool_calls_problem(value: Any) -> str | None:
    """Returns what is wrong with the `tool_calls` of a message, or None.

    A message has at most one call: the token that ends a call ends the turn, and the official template writes only
    the first.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        return f"has tool_calls {shown(value)}; wanted a list of one call"
    if len(value) != 1:
        return f"has {len(value)} tool_calls; wanted one: Harmony's turns end with a call, give each its own message"
    function = value[0].get("function") if isinstance(value[0], Mapping) else None
    if not isinstance(function, Mapping):
        return f'has the tool call {shown(value[0])}; wanted {{"function": {{"name": ..., "arguments": ...}}}}'
    return call_problem(function.get("name"), function.get("arguments"))


def call_problem(name: Any, arguments: Any) -> str | None:
    """Returns what is wrong with the name and the arguments of a call, or None."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        return f"calls a function named {shown(name)}; wanted letters, digits, dots, dashes and underscores"
    if isinstance(arguments, Mapping):
        return None
    try:
        is_object = isinstance(arguments, str) and isinstance(json.loads(arguments), dict)
    except json.JSONDecodeError:
        is_object = False
    return None if is_object else f"calls {name} with arguments {shown(arguments)}; wanted a JSON object"


def tool_calls_of(value: Sequence[Mapping[str, Any]]) -> tuple[ToolCall, ...]:
    """Returns the calls of a valid list; arguments that are an object are written as JSON."""
    functions = [call["function"] for call in value]
    return tuple(ToolCall(function["name"], json_text(function["arguments"])) for function in functions)


def tools_problem(value: Any) -> str | None:
    """Returns what is wrong with the functions that a conversation offers, or None."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return f"tools is {shown(value)}; wanted a list of functions"
    problems = ((index, _tool_problem(tool)) for index, tool in enumerate(value))
    found = next((f"tools[{index}] {problem}" for index, problem in problems if problem is not None), None)
    if found is not None:
        return found
    names = [tool["function"]["name"] for tool in value]
    repeated = sorted({name for name in names if names.count(name) > 1})
    return f"tools has {', '.join(repeated)} more than once; wanted each function once" if repeated else None


def _tool_problem(tool: Any) -> str | None:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or tool.get("type", "function") != "function":
        return f'is {shown(tool)}; wanted {{"type": "function", "function": {{"name": ..., "parameters": ...}}}}'
    name, description, parameters = (function.get(key) for key in ("name", "description", "parameters"))
    if not isinstance(name, str) or not NAME.fullmatch(name):
        return f"is named {shown(name)}; wanted letters, digits, dots, dashes and underscores"
    if not isinstance(description, str | None):
        return f"({name}) has description {shown(description)}; wanted a string"
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    if not isinstance(parameters, Mapping | None) or not isinstance(properties, Mapping | None):
        return f"({name}) has parameters {shown(parameters)}; wanted the JSON Schema of an object"
    return None


def tools_of(value: Sequence[Mapping[str, Any]]) -> tuple[Tool, ...]:
    """Returns the functions of a valid list, without fields that templates do not write (`strict`)."""
    functions = [tool["function"] for tool in value]
    return tuple(
        Tool(
            function["name"],
            function.get("description") or "",
            json_text(function["parameters"]) if function.get("parameters") else None,
        )
        for function in functions
    )


def nested(tool: Any) -> Any:
    """Returns a function in OpenAI's shape, from one whose name is not under `function`; any other value as it is."""
    is_flat = isinstance(tool, dict) and "function" not in tool and isinstance(tool.get("name"), str)
    if not is_flat or tool.get("type", "function") != "function":
        return tool
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}


def json_text(value: Any) -> str:
    """Returns JSON as chat templates write it (transformers' `tojson`); a text is taken to be JSON already."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def shown(value: Any) -> str:
    """Returns a value's repr for an error, shortened to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
