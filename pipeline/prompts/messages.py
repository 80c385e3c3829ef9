"""Defines conversations before they are rendered: roles, efforts, and which messages make a prompt."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.prompts.tools import ToolCall, shown, tool_calls_of, tool_calls_problem

EFFORTS = ("low", "medium", "high")
INSTRUCTION_ROLES = ("system", "developer")
ROLES = (*INSTRUCTION_ROLES, "user", "assistant", "tool")
ASKING_ROLES = ("user", "tool")  # the model answers them
THINKING = ("thinking", "reasoning_content", "reasoning")  # the template's name for analysis, then those of endpoints


@dataclasses.dataclass(frozen=True)
class Message:
    """Holds one turn; `role` is one of ROLES. Harmony renders system and developer alike, as instructions.

    `thinking` is the analysis of an assistant's turn, which the official template writes before a call until a later
    turn has answered, and drops elsewhere. A tool's message is the result of the call right before it, so that calls
    need no ids.
    """

    role: str
    content: str
    thinking: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Returns OpenAI's shape without absent fields; `message_of` reads it back."""
        fields: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.thinking is not None:
            fields["thinking"] = self.thinking
        if self.tool_calls:
            fields["tool_calls"] = [call.as_dict() for call in self.tool_calls]
        return fields


def message_of(fields: Mapping[str, Any]) -> Message:
    """Returns the message of an object in which `messages_problem` found nothing; null fields count as absent."""
    thoughts = [fields[key] for key in THINKING if fields.get(key)]
    calls = tool_calls_of(fields.get("tool_calls") or ())
    return Message(fields["role"], fields.get("content") or "", thoughts[0] if thoughts else None, calls)


def effort_problem(effort: Any) -> str | None:
    """Returns what is wrong with a reasoning effort, or None."""
    if effort in EFFORTS:
        return None
    return f"reasoning effort is {effort!r}; wanted one of {', '.join(EFFORTS)}"


def messages_problem(messages: Any, *, may_be_empty: bool = False) -> str | None:
    """Returns why `messages` is not a prompt that GPT-OSS can answer, or None; empty contents have to be allowed.

    Messages that the official template would silently drop or misread are refused: instructions that do not come
    first, a second call in one message, a result without its call, both an analysis and a text beside a call. The
    last message is the user's or a tool's, because the model writes the answer.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        return f"messages is {shown(messages)}; wanted a non-empty list of role and content objects"
    for index, message in enumerate(messages):
        problem = _message_problem(message, may_be_empty=may_be_empty) or _order_problem(messages, index)
        if problem is not None:
            return f"messages[{index}] {problem}"
    if messages[-1]["role"] not in ASKING_ROLES:
        return f"the last message is the {messages[-1]['role']}'s; wanted the user's or a tool's: leave the reply out"
    return None


def _message_problem(message: Any, *, may_be_empty: bool) -> str | None:
    if not isinstance(message, Mapping):
        return f"is {shown(message)}; wanted an object with role and content"
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    if role not in ROLES:
        return f"has role {role!r}; wanted one of {', '.join(ROLES)}"
    if role == "assistant":
        return _assistant_problem(message, may_be_empty=may_be_empty)
    if calls:
        return f"has role {role!r} and tool_calls; the assistant alone calls tools"
    if any(message.get(key) for key in THINKING):
        return f"has role {role!r} and thinking; the assistant alone thinks"
    return _content_problem(content, may_be_empty=may_be_empty or role == "tool")


def _assistant_problem(message: Mapping[str, Any], *, may_be_empty: bool) -> str | None:
    calls, content = message.get("tool_calls"), message.get("content")
    thoughts = {key: message[key] for key in THINKING if message.get(key)}
    for key, value in thoughts.items():
        if not isinstance(value, str):
            return f"has {key} {shown(value)}; wanted a string"
    if len(set(thoughts.values())) > 1:
        return f"has {' and '.join(thoughts)}, which differ; wanted one of them"
    if not calls:
        return _content_problem(content, may_be_empty=may_be_empty)
    if content and thoughts:
        return "has content and thinking beside a tool call; the template writes one of them: join them in thinking"
    problem = None if content is None else _content_problem(content, may_be_empty=True)
    return problem or tool_calls_problem(calls)


def _content_problem(content: Any, *, may_be_empty: bool) -> str | None:
    if not isinstance(content, str):
        return f"has content {shown(content)}; wanted a string"
    return None if may_be_empty or content.strip() else "has empty content; wanted text"


def _order_problem(messages: Sequence[Mapping[str, Any]], index: int) -> str | None:
    """Returns what is wrong with the position of a message after valid ones, or None."""
    message, before = messages[index], messages[index - 1] if index else {}
    if message["role"] in INSTRUCTION_ROLES and index > 0:
        return f"has role {message['role']!r} after other messages; wanted instructions in the first message only"
    if message["role"] != "tool":
        return None
    calls = before.get("tool_calls") or ()
    if not calls:
        return "is a tool's; wanted the assistant's call right before it"
    called = {"tool_call_id": calls[0].get("id"), "name": calls[0]["function"]["name"]}
    for key, wanted in called.items():
        if wanted is not None and message.get(key) not in (None, wanted):
            return f"has {key} {shown(message[key])}; wanted that of the call before it, {shown(wanted)}"
    return None
