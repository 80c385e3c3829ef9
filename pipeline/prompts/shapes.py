"""Reads a row of a prompt file in the shapes that people have: prompt, messages, ShareGPT and Alpaca.

What `strict_problem` finds nothing in is read as it always was. Other rows are read where their meaning is plain, and
are left out otherwise; a person chooses between two readings that fit (docs/guide/data.md).
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.errors import PipelineError
from pipeline.prompts.messages import ASKING_ROLES, INSTRUCTION_ROLES, THINKING, effort_problem, messages_problem
from pipeline.prompts.tools import nested, shown, tools_problem
from pipeline.prompts.turns import join_instructions, separate_calls

FIELDS = {  # of each shape, the fields that one of which makes a row of it
    "prompt": ("prompt",),
    "messages": ("messages",),
    "sharegpt": ("conversations", "conversation"),
    "alpaca": ("instruction",),
}
TITLES = {"prompt": "prompt", "messages": "messages", "sharegpt": "ShareGPT", "alpaca": "Alpaca"}
EFFORT_FIELDS = ("effort", "reasoning_effort")
ROW_FIELDS = ("tools", *EFFORT_FIELDS, "system")  # read beside the prompt or the messages
ALPACA_ANSWERS = ("output", "response")
ALPACA_FIELDS = ("input", "history", *ALPACA_ANSWERS)  # beside the instruction
MEDIA_FIELDS = ("image", "images", "audio", "audios", "video", "videos")
ROLES = {  # what others call them
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
}
TEXT_PARTS = ("text", "input_text", "output_text")
NOT_READABLE, NO_USER, MEDIA = "not readable", "without a user turn", "with images, sound or files"
NO_ANSWER = "without an answer"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """Holds what a row asks; `answer` has the assistant's turns at its end, as they are written.

    `unread` names what else the row holds that could be meant.
    """

    shape: str
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]]
    effort: str | None
    answer: Sequence[Mapping[str, Any]] = ()
    unread: str | None = None


class LeftOut(Exception):
    """Says why a row is left out; `kind` is the reason that rows are counted by."""

    def __init__(self, problem: str | None, kind: str = NOT_READABLE) -> None:
        super().__init__(problem or kind)
        self.kind = kind


def read(row: Any, shape: str | None) -> Row | LeftOut:
    """Returns what a row asks in this shape, or in the one that its fields show, or why it is left out.

    Raises PipelineError that names both readings when two fit.
    """
    try:
        if shape is None:
            problem = strict_problem(row)
            if problem is None and ("prompt" in row or not isinstance(row.get("system"), str)):
                return _strict(row)
            shape = _shape_of(row, problem)
        elif not isinstance(row, dict) or all(row.get(field) is None for field in FIELDS[shape]):
            raise LeftOut(f"has no {FIELDS[shape][0]}, which prompts.shape={shape} reads")
        return _tolerant(row, shape)
    except LeftOut as reason:
        return reason


def strict_problem(row: Any) -> str | None:
    """Returns why a row is not one of ours, a prompt or OpenAI's messages to be answered; None when it is."""
    if not isinstance(row, dict):
        return f"is a {type(row).__name__}; wanted an object with prompt or messages"
    problem = _unicode_problem(row)
    if problem is not None:
        return problem
    if ("prompt" in row) == ("messages" in row):
        fields = ", ".join(map(str, row)) or "none"
        return f"has the fields {fields}; wanted exactly one of prompt and messages"
    if "prompt" in row and not (isinstance(row["prompt"], str) and row["prompt"].strip()):
        return f"has prompt {row['prompt']!r}; wanted a non-empty string"
    efforts = [row[key] for key in EFFORT_FIELDS if row.get(key) is not None]
    if len(efforts) == 2 and efforts[0] != efforts[1]:
        return f"has effort {efforts[0]!r} and reasoning_effort {efforts[1]!r}; wanted one of them"
    problem = effort_problem(efforts[0]) if efforts else None
    problem = problem or (messages_problem(row["messages"]) if "messages" in row else None)
    return problem or tools_problem(_list_in(row.get("tools")))


def _unicode_problem(row: Any) -> str | None:
    try:
        json.dumps(row, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        return f"is not valid Unicode ({error}); wanted text that UTF-8 can write"
    return None


def conversation_in(text: Any) -> bool:
    """Returns whether a text is the JSON of a conversation."""
    turns = _json(text) if isinstance(text, str) and text.lstrip().startswith("[") else None
    if not isinstance(turns, list) or not turns:
        return False
    return all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in turns)


def _strict(row: dict[str, Any]) -> Row:
    shape = "prompt" if "prompt" in row else "messages"
    messages = row["messages"] if shape == "messages" else [{"role": "user", "content": row["prompt"]}]
    others = [other for other in _fitting(row) if other != shape]
    unread = f"prompts.shape={others[0]} would read {FIELDS[others[0]][0]} instead" if others else None
    if shape == "prompt" and row.get("system"):
        unread = "system is not read beside a prompt, only beside messages"
    effort = row.get("effort") or row.get("reasoning_effort")
    return Row(shape=shape, messages=messages, tools=_list_in(row.get("tools")), effort=effort, unread=unread)


def _fitting(row: dict[str, Any]) -> list[str]:
    return [shape for shape, fields in FIELDS.items() if any(row.get(field) is not None for field in fields)]


def _shape_of(row: Any, problem: str | None) -> str:
    """Returns the shape of a row that is not strictly ours, which `problem` says."""
    fitting = _fitting(row) if isinstance(row, dict) else []
    if fitting[:2] == ["prompt", "messages"] and len(fitting) == 2:
        if not row["messages"]:
            raise LeftOut(problem)
        if _holds(_json(row["messages"]), row["prompt"]):
            return "messages"
    if not fitting:
        raise LeftOut(problem)
    if len(fitting) > 1:
        first, second = (FIELDS[shape][0] for shape in fitting[:2])
        raise PipelineError(
            f"has {first} and {second}, and can be read as {TITLES[fitting[0]]} ({shown(row.get(first))}) or as "
            f"{TITLES[fitting[1]]} ({shown(row.get(second))}): choose prompts.shape={fitting[0]} or "
            f"prompts.shape={fitting[1]}"
        )
    return fitting[0]


def _holds(messages: Any, prompt: Any) -> bool:
    """Returns whether a conversation holds the prompt beside it, as UltraChat's do."""
    turns = _turns(messages)
    if isinstance(prompt, str):
        asked = [turn["content"] for turn in turns if turn.get("role") == "user"]
        return prompt.strip() in [text.strip() for text in asked if isinstance(text, str)]
    return isinstance(prompt, list) and turns[: len(prompt)] == _turns(prompt)


def _tolerant(row: dict[str, Any], shape: str) -> Row:
    value = next(row[field] for field in FIELDS[shape] if row.get(field) is not None)
    if any(row.get(field) for field in MEDIA_FIELDS):
        raise LeftOut(None, MEDIA)
    if shape == "alpaca":
        value = _alpaca(row)
    elif shape == "prompt" and isinstance(value, str):
        if not value.strip():
            raise LeftOut(f"has prompt {value!r}; wanted a non-empty string")
        value = [{"role": "user", "content": value}]
    elif shape == "prompt" and not isinstance(value, list):
        raise LeftOut(f"has prompt {value!r}; wanted a non-empty string")
    # what is no text, and what stands beside a prompt that is one, was never read
    is_read = isinstance(row.get("system"), str) and not (shape == "prompt" and isinstance(row["prompt"], str))
    try:
        turns = join_instructions(_turns(_json(value)), row["system"] if is_read else None)
        asked, answer = _asked(turns)
        messages = separate_calls(asked)
    except PipelineError as error:
        raise LeftOut(str(error)) from error
    tools = _list_in(row.get("tools"))
    tools = [nested(tool) for tool in tools] if isinstance(tools, list) else tools
    problem = _unicode_problem(row) or messages_problem(messages) or tools_problem(tools)
    if problem is not None:
        raise LeftOut(problem)
    return Row(shape=shape, messages=messages, tools=tools, effort=_effort(row), answer=answer)


def _alpaca(row: dict[str, Any]) -> list[dict[str, Any]]:
    instruction, text = row["instruction"], row.get("input") or ""
    if not isinstance(instruction, str) or not isinstance(text, str) or not instruction.strip():
        raise LeftOut(f"has instruction {shown(instruction)} and input {shown(text)}; wanted texts")
    if row.get("history"):
        raise LeftOut("has a history beside the instruction; write it as messages")
    answer = next((row[field] for field in ALPACA_ANSWERS if isinstance(row.get(field), str) and row[field]), None)
    turns = [{"role": "user", "content": f"{instruction}\n{text}" if text.strip() else instruction}]
    return turns if answer is None else [*turns, {"role": "assistant", "content": answer}]


def _effort(row: dict[str, Any]) -> str | None:
    efforts = [row[key] for key in EFFORT_FIELDS if row.get(key) is not None]
    if not efforts:
        return None
    plain = [effort.strip().lower() if isinstance(effort, str) else effort for effort in efforts]
    if plain[0] != plain[-1]:
        raise LeftOut(f"has effort {efforts[0]!r} and reasoning_effort {efforts[1]!r}; wanted one of them")
    effort = "low" if plain[0] == "minimal" else plain[0]  # the least that Harmony has
    if effort_problem(effort) is not None:
        raise LeftOut(effort_problem(efforts[0]))
    return effort


def _json(value: Any) -> Any:
    """Returns what a text is the JSON of; a text that is no JSON, and any other value, is returned unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _list_in(value: Any) -> Any:
    """Returns a list that may be written as JSON; nothing and an empty text are an empty list."""
    found = _json(value)
    return [] if found is None or found in ("", {}) else found


def _turns(messages: Any) -> list[dict[str, Any]]:
    """Returns a conversation's turns with OpenAI's names; raises LeftOut."""
    if not isinstance(messages, list) or not messages or not all(isinstance(turn, dict) for turn in messages):
        raise LeftOut(messages_problem(messages))
    return [_turn(turn) for turn in messages]


def _turn(turn: dict[str, Any]) -> dict[str, Any]:
    """Returns a turn with OpenAI's names: from and value, other roles, parts of texts, older and flat calls."""
    spelled = turn.get("role") or turn.get("from")
    role = spelled.strip().lower() if isinstance(spelled, str) else spelled
    content = turn["content"] if turn.get("content") is not None else turn.get("value")
    calls = _list_in(turn.get("tool_calls")) or turn.get("function_call")
    if role == "function_call":
        content, calls = None, _json(content)
    calls = [calls] if isinstance(calls, dict) else calls
    others = {key: value for key, value in turn.items() if key not in ("from", "value", "tool_calls", "function_call")}
    found = others | {"role": ROLES.get(role, role) if isinstance(role, str) else role, "content": _text(content)}
    if calls:
        found["tool_calls"] = [_call(call) for call in calls] if isinstance(calls, list) else calls
    return found


def _text(content: Any) -> Any:
    """Returns the text of a content that may be a list of parts; raises LeftOut for parts that are no text."""
    if not isinstance(content, list):
        return content
    return "".join(part if isinstance(part, str) else _part(part) for part in content)  # as the server joins them


def _part(part: Any) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type", "text") in TEXT_PARTS else None
    if not isinstance(text, str):
        raise LeftOut(f"has the content {shown(part)}; wanted text alone", MEDIA)
    return text


def _call(call: Any) -> Any:
    """Returns a call in OpenAI's shape, from one that may be flat or without arguments."""
    if not isinstance(call, dict):
        return call
    function = call["function"] if isinstance(call.get("function"), dict) else call
    named = {key: value for key, value in call.items() if key in ("id", "type")}
    arguments = "{}" if function.get("arguments") in (None, "") else function["arguments"]
    return named | {"function": {"name": function.get("name"), "arguments": arguments}}


def _asked(turns: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns the turns without the answer at their end, and the turns of that answer which say something."""
    asking = [index for index, turn in enumerate(turns) if turn["role"] in ASKING_ROLES]
    if not asking:
        unknown = any(turn["role"] not in ("assistant", "tool", *INSTRUCTION_ROLES) for turn in turns)
        raise LeftOut(messages_problem(turns) if turns else None, NOT_READABLE if unknown else NO_USER)
    answer = turns[asking[-1] + 1 :]
    if any(turn["role"] != "assistant" for turn in answer):
        return turns, []  # what stands there is reported
    spoken = ("content", "tool_calls", *THINKING)
    return turns[: asking[-1] + 1], [turn for turn in answer if any(turn.get(field) for field in spoken)]
