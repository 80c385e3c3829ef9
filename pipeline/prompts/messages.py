"""What a conversation is made of before it is rendered: roles, efforts, and which messages make a prompt."""

import dataclasses
from collections.abc import Sequence
from typing import Any

EFFORTS = ("low", "medium", "high")
INSTRUCTION_ROLES = ("system", "developer")
ROLES = (*INSTRUCTION_ROLES, "user", "assistant")


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn. `role` is one of ROLES; Harmony renders system and developer alike, as instructions."""

    role: str
    content: str

    def as_dict(self) -> dict[str, str]:
        """The shape chat templates take."""
        return {"role": self.role, "content": self.content}


def effort_problem(effort: Any) -> str | None:
    """What is wrong with a reasoning effort, or None."""
    if effort in EFFORTS:
        return None
    return f"reasoning effort is {effort!r}; wanted one of {', '.join(EFFORTS)}"


def messages_problem(messages: Any) -> str | None:
    """What keeps `messages` from being a prompt that GPT-OSS can answer, or None.

    Instructions come first or not at all, because the official template silently drops later ones; the
    user speaks last, because the answer is the model's to write.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        return f"messages is {_shown(messages)}; wanted a non-empty list of role and content objects"
    for index, message in enumerate(messages):
        problem = _message_problem(message, index)
        if problem is not None:
            return f"messages[{index}] {problem}"
    if messages[-1]["role"] != "user":
        return f"the last message is the {messages[-1]['role']}'s; wanted the user's: leave the reply out"
    return None


def _message_problem(message: Any, index: int) -> str | None:
    if not isinstance(message, dict):
        return f"is {_shown(message)}; wanted an object with role and content"
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        return f"has role {role!r}; wanted one of {', '.join(ROLES)}"
    if not isinstance(content, str):
        return f"has content {_shown(content)}; wanted a string"
    if not content.strip():
        return "has empty content; wanted text"
    if role in INSTRUCTION_ROLES and index > 0:
        return f"has role {role!r} after other messages; wanted instructions in the first message only"
    return None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
