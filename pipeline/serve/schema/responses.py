"""Bodies of /v1/responses: items of a conversation in, and tools that are not nested as a chat's are."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, PlainValidator, TypeAdapter, WithJsonSchema

from pipeline.model.layers.token_rules import MAX_LOGPROBS
from pipeline.prompts.shapes import TEXT_PARTS
from pipeline.prompts.tools import nested
from pipeline.serve.errors import ApiError
from pipeline.serve.schema.chat import ChatBody, ChosenEffort, ToolChoice, require_choosable
from pipeline.serve.schema.fields import Body, Unserved, Wanted, parse, shown, valid_text
from pipeline.serve.schema.format_fields import response_form
from pipeline.serve.schema.messages import Message, text_of
from pipeline.serve.schema.options import Count, Ignored, Number

_UNSERVED: Unserved = {
    "background": ((False,), "responses are not made in the background: use false or leave it out"),
    "conversation": ((), "conversations are not stored: use previous_response_id"),
    "prompt": ((), "prompt templates are not supported: write the input"),
    "truncation": (("disabled",), "inputs are not truncated: use disabled or leave it out"),
    "include": (([], ["reasoning.encrypted_content"]), "reasoning is in the output already: leave it out"),
    "max_tool_calls": ((), "the client runs the tools: leave it out"),
    "presence_penalty": ((0,), "use 0 or leave it out"),
    "frequency_penalty": ((0,), "use 0 or leave it out"),
}
TEXT_KINDS = (*TEXT_PARTS, "reasoning_text", "summary_text")


class TextFormat(Body):
    """How the text of an answer is formed: as any text, or as JSON."""

    format: dict[str, Any] | None = None
    verbosity: str | None = None


class Reasoning(Body):
    """How much the model thinks; a summary of its analysis is not made, for the analysis itself is in the output."""

    effort: ChosenEffort | None = None
    summary: Ignored = None
    generate_summary: Ignored = None


def _items(value: Any) -> list[dict[str, Any]]:
    """Returns the input as items."""
    if isinstance(value, str):
        return [{"role": "user", "content": valid_text(value, "input")}]
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return value
    raise ApiError(f"input is {shown(value)}; wanted a text or a non-empty list of items", param="input")


Items = Annotated[
    list[dict[str, Any]],
    PlainValidator(_items),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}, "minItems": 1}]}),
]


RawChoice = Annotated[Any, WithJsonSchema(TypeAdapter(ToolChoice).json_schema())]  # read when it becomes a chat's


class ResponseBody(Body):
    """Holds a body of /v1/responses."""

    model: str
    input: Items
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: Count | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_logprobs: Annotated[int | None, Wanted(f"a whole number from 0 to {MAX_LOGPROBS}")] = None
    stream: bool = False
    stream_options: Ignored = None
    store: bool = True
    tools: Annotated[list[dict[str, Any]], Wanted("a list of functions")] = Field(default_factory=list)
    tool_choice: RawChoice = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextFormat | None = None
    metadata: Ignored = None
    user: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None

    @property
    def effort(self) -> str | None:
        """The reasoning effort; None where nothing was said."""
        return None if self.reasoning is None else self.reasoning.effort

    @property
    def nested_tools(self) -> list[Any]:
        """The tools in the shape that a chat has."""
        return [nested(tool) if tool.get("type") == "function" else tool for tool in self.tools]

    def as_chat(self, before: Sequence[dict[str, Any]]) -> ChatBody:
        """Returns what a chat would ask, behind the items of earlier responses; raises ApiError."""
        messages = messages_of([*before, *self.input])
        if self.instructions is not None:
            instructions = Message(role="system", content=valid_text(self.instructions, "instructions"))
            messages = [instructions, *messages]
        wanted = {
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "reasoning_effort": self.effort,
            "tool_choice": self.tool_choice,
            "top_logprobs": self.top_logprobs,
            "response_format": self.text and self.text.format,
        }
        chat = ChatBody(
            model=self.model,
            messages=messages,
            stream=self.stream,
            tools=self.nested_tools,
            logprobs=self.top_logprobs is not None,
            **{name: value for name, value in wanted.items() if value is not None},
        )
        require_choosable(chat)
        return chat


def messages_of(items: Sequence[dict[str, Any]]) -> list[Message]:
    """Returns the messages that items come to: analysis and calls go with the assistant's turn that they belong to."""
    found: list[dict[str, Any]] = []
    for index, item in enumerate(items):
        name = f"input[{index}]"
        kind = item.get("type", "message")
        if kind == "message":
            found.append({"role": item.get("role"), "content": _text(item.get("content"), name)})
            _join_analysis(found)
        elif kind == "reasoning":
            parts = item.get("content") or item.get("summary") or []
            found.append({"role": "assistant", "reasoning": _text(parts, name)})
        elif kind == "function_call":
            call = {"id": item.get("call_id"), "function": {key: item.get(key) for key in ("name", "arguments")}}
            _add_call(found, call)
        elif kind == "function_call_output":
            found.append(
                {"role": "tool", "tool_call_id": item.get("call_id"), "content": _text(item.get("output"), name)}
            )
        else:
            raise ApiError(
                f"{name} is of type {shown(kind)}; supported: message, reasoning, function_call, function_call_output",
                param="input",
            )
    return [_message(message, index) for index, message in enumerate(found) if not _is_analysis_alone(message)]


def _is_analysis_alone(message: dict[str, Any]) -> bool:
    return message["role"] == "assistant" and message.keys() == {"role", "reasoning"}


def _join_analysis(found: list[dict[str, Any]]) -> None:
    """Gives the assistant's text the analysis right before it."""
    if len(found) > 1 and found[-1]["role"] == "assistant" and _is_analysis_alone(found[-2]):
        found[-2:] = [found[-2] | found[-1]]


def _add_call(found: list[dict[str, Any]], call: dict[str, Any]) -> None:
    """Adds a call to the assistant's turn at the end, or begins one."""
    if not found or found[-1]["role"] != "assistant":
        found.append({"role": "assistant"})
    found[-1].setdefault("tool_calls", []).append(call)


def _text(value: Any, name: str) -> str:
    try:
        return text_of(value, "input", TEXT_KINDS)
    except ValueError as error:
        raise ApiError(f"{name}: the content {error}", param="input") from error


def _message(value: dict[str, Any], index: int) -> Message:
    try:
        return Message.model_validate(value)
    except ValueError as error:
        raise ApiError(
            f"input makes the message {shown(value)}, which is none: check item {index}", param="input"
        ) from error


def read_response(body: Any, model: str) -> ResponseBody:
    """Returns the body of a request to /v1/responses for the served `model`; raises ApiError."""
    found = parse(ResponseBody, body, model, _UNSERVED, required=("input",))
    if found.text is not None and found.text.format is not None:
        response_form(found.text.format, "text")
    if found.text is not None and found.text.verbosity not in (None, "medium"):
        raise ApiError("text.verbosity is not supported: use medium or leave it out", param="text")
    if not 0 <= (found.top_logprobs or 0) <= MAX_LOGPROBS:
        raise ApiError(f"top_logprobs is {found.top_logprobs}; wanted 0 to {MAX_LOGPROBS}", param="top_logprobs")
    return found
