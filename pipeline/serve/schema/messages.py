"""The messages of a conversation as clients send them, and as the chat formats take them."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, PlainValidator, WithJsonSchema

from pipeline.prompts.messages import THINKING
from pipeline.prompts.shapes import TEXT_PARTS
from pipeline.serve.schema.fields import Body, shown, valid_text

REFUSAL = "refusal"


def text_of(value: Any, param: str, kinds: Sequence[str] = TEXT_PARTS) -> str:
    """Returns a content's text, "" for none; its parts must all be texts of these kinds, or refusals.

    Raises ValueError that says what is wrong with it, and ApiError that names `param` for text that is not Unicode.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return valid_text(value, param)
    if not isinstance(value, list):
        raise ValueError(f"is {shown(value)}; wanted a string or a list of text parts")
    return "".join(_part(part, param, kinds) for part in value)


def _part(part: Any, param: str, kinds: Sequence[str]) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in (*kinds, REFUSAL):
        raise ValueError(f"has the part {shown(part)}; supported: text parts")
    text = part.get(REFUSAL if kind == REFUSAL else "text")
    if not isinstance(text, str):
        raise ValueError(f"has the part {shown(part)}; wanted a string for its text")
    return valid_text(text, param)


Content = Annotated[
    str,
    PlainValidator(lambda value: text_of(value, "messages")),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "null"},
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                        "required": ["type", "text"],
                        "additionalProperties": False,
                    },
                },
            ]
        }
    ),
]


class CalledFunction(Body):
    """A function's name and the JSON of its arguments."""

    model_config = ConfigDict(extra="ignore", strict=True)

    name: str
    arguments: str | dict[str, Any] = "{}"


class Call(Body):
    """A call of a function by the assistant."""

    model_config = ConfigDict(extra="ignore", strict=True)  # index, and what other servers add

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    """One turn; a null field counts as left out."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = ""
    name: str | None = Field(
        default=None, description="Accepted; the chat format writes no names but those of functions."
    )
    thinking: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    function_call: None = None
    audio: None = None
    annotations: Annotated[Any, Field(description="Accepted; changes nothing.")] = None

    def as_dict(self) -> dict[str, Any]:
        """Returns what `prompts.messages` takes."""
        found: dict[str, Any] = {"role": self.role, "content": self.content or self.refusal or ""}
        for name in (*THINKING, "tool_call_id"):
            if getattr(self, name):
                found[name] = getattr(self, name)
        if self.role == "tool" and self.name:
            found["name"] = self.name
        if self.tool_calls:
            found["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        return found
