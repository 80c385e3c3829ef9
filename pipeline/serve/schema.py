"""Checks OpenAI's request bodies key by key: what is not served is refused, never ignored."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from pipeline.engine.sampling_params import SamplingParams
from pipeline.prompts.messages import EFFORTS, THINKING, effort_problem
from pipeline.serve import sampling_fields
from pipeline.serve.errors import ApiError
from pipeline.serve.values import flag, is_integer, shown

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
MAX_STOP_STRINGS = 16

# Options that are not served: the values that ask for nothing, and what to do.
_UNSERVED: dict[str, tuple[tuple[Any, ...], str]] = {
    "n": ((1,), "a prompt has one answer: use 1, or send the request again"),
    "best_of": ((1,), "a prompt has one answer: use 1 or leave it out"),
    "length_penalty": ((1,), "beams are not searched: use 1 or leave it out"),
    "logprobs": ((False,), "log probabilities are not supported: leave it out"),
    "top_logprobs": ((0,), "log probabilities are not supported: leave it out"),
    "prompt_logprobs": ((), "log probabilities are not supported: leave it out"),
    "use_beam_search": ((False,), "beams are not searched: use false or leave it out"),
}
_UNSERVED_COMPLETION = {
    "echo": ((False,), "the prompt is not echoed: use false or leave it out"),
    "suffix": (("",), "insertion is not supported: leave it out"),
}
_UNSERVED_CHAT = {
    "functions": (([],), "this older form is not supported: use tools"),
    "function_call": (("none", "auto"), "this older form is not supported: use tool_choice"),
    "response_format": (({"type": "text"},), "only text answers are supported: leave it out"),
    "modalities": ((["text"],), "only text answers are supported: leave it out"),
    "audio": ((), "only text answers are supported: leave it out"),
    "prediction": ((), "predicted outputs come from the draft alone: leave it out"),
    "web_search_options": ((), "web search is not supported: leave it out"),
}
_HARMLESS = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
_COMMON = ("model", "stream", "stream_options", "max_tokens", "stop", *sampling_fields.FIELDS, *_HARMLESS)
_COMPLETION = ("prompt", "return_token_ids", *_COMMON)
_TOOLS = ("tools", "tool_choice", "parallel_tool_calls")
_CHAT = ("messages", "max_completion_tokens", "reasoning_effort", "return_token_ids", *_TOOLS, *_COMMON)
_FIELDS = {  # of a message beside its role and content
    "assistant": (*THINKING, "tool_calls"),
    "tool": ("tool_call_id", "name"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Holds what both endpoints take.

    `max_tokens` None: as many as the context has room for; `seed` None: any; `sampling` has no key yet.
    """

    max_tokens: int | None
    sampling: SamplingParams
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    stream_usage: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionBody(Options):
    """Holds a body of /v1/completions: each prompt is text or tokens."""

    prompts: tuple[str | tuple[int, ...], ...]
    return_token_ids: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatBody(Options):
    """Holds a body of /v1/chat/completions; `effort` None: the server's default. No `tools` when none may be called."""

    messages: list[dict[str, Any]]
    tools: list[Any]
    effort: str | None
    return_token_ids: bool


def read_completion(body: Any, model: str, stops: tuple[int, ...]) -> CompletionBody:
    """Returns the body of a request to /v1/completions for the served `model` with its stop tokens; raises ApiError."""
    values = _requested(body, model, _COMPLETION, {**_UNSERVED, **_UNSERVED_COMPLETION})
    options = _options(values, stops)
    if options["max_tokens"] is None:
        options["max_tokens"] = DEFAULT_COMPLETION_TOKENS
    return CompletionBody(
        prompts=_prompts(values.get("prompt")), return_token_ids=flag(values, "return_token_ids"), **options
    )


def read_chat(body: Any, model: str, stops: tuple[int, ...]) -> ChatBody:
    """Returns the body of a request to /v1/chat/completions, as `read_completion` does; raises ApiError."""
    values = _requested(body, model, _CHAT, {**_UNSERVED, **_UNSERVED_CHAT})
    effort = values.get("reasoning_effort")
    if effort is not None and effort_problem(effort) is not None:
        raise ApiError(
            f"reasoning_effort is {shown(effort)}; supported: {', '.join(EFFORTS)}", param="reasoning_effort"
        )
    options = _options(values, stops)
    limits = {key: _count(values, key) for key in ("max_tokens", "max_completion_tokens") if key in values}
    if len(set(limits.values())) > 1:
        both = " and ".join(f"{key} is {value}" for key, value in limits.items())
        raise ApiError(f"{both}; give one of them, or the same value", param="max_completion_tokens")
    options["max_tokens"] = next(iter(limits.values()), None)
    token_ids = flag(values, "return_token_ids")
    if token_ids and options["stream"]:
        raise ApiError("return_token_ids is served without stream alone: leave either out", param="return_token_ids")
    messages, tools = _messages(values.get("messages")), _tools(values)
    return ChatBody(messages=messages, tools=tools, effort=effort, return_token_ids=token_ids, **options)


def _requested(
    body: Any, model: str, known: tuple[str, ...], unserved: Mapping[str, tuple[tuple[Any, ...], str]]
) -> dict[str, Any]:
    """Returns the keys that ask for something, null ones left out. Raises ApiError for what is not served."""
    if not isinstance(body, dict):
        raise ApiError(f"the body is {shown(body)}; wanted a JSON object")
    values = {key: value for key, value in body.items() if value is not None}
    name = values.get("model")
    if not isinstance(name, str):
        raise ApiError(f"model is {shown(name)}; wanted a name; {model!r} is served", param="model")
    if name != model:
        raise ApiError(
            f"the model {shown(name)} is not served here; served: {model!r}",
            param="model",
            code="model_not_found",
            status=404,
        )
    for key, value in values.items():
        if key in unserved:
            neutral, advice = unserved[key]
            if not any(_same(value, harmless) for harmless in neutral):
                raise ApiError(f"{key} is {shown(value)}; {advice}", param=key, code="unsupported_value")
        elif key not in known:
            raise ApiError(
                f"the parameter {shown(key)} is not known; supported: {', '.join(known)}",
                param=key.encode(errors="replace").decode(),  # half of a surrogate pair cannot be sent back
                code="unknown_parameter",
            )
    return values


def _options(values: Mapping[str, Any], stops: tuple[int, ...]) -> dict[str, Any]:
    stream, stream_options = flag(values, "stream"), values.get("stream_options", {})
    if not isinstance(stream_options, dict) or stream_options.keys() - {"include_usage"}:
        raise ApiError(
            f"stream_options is {shown(stream_options)}; supported: an object with include_usage",
            param="stream_options",
        )
    if stream_options and not stream:
        raise ApiError("stream_options is given without stream; set stream to true", param="stream_options")
    return {
        "max_tokens": _count(values, "max_tokens"),
        "stop": _stop(values.get("stop", [])),
        "stream": stream,
        "stream_usage": flag(stream_options, "include_usage"),
        "sampling": sampling_fields.read_sampling(values, stops),
        "seed": values.get("seed"),
    }


def _count(values: Mapping[str, Any], key: str) -> int | None:
    value = values.get(key)
    if value is None:
        return None
    if not is_integer(value) or value < 1:
        raise ApiError(f"{key} is {shown(value)}; wanted a whole number of at least 1", param=key)
    return value


def _stop(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise ApiError(f"stop is {shown(value)}; wanted a non-empty string or a list of them", param="stop")
    if len(texts) > MAX_STOP_STRINGS:
        raise ApiError(f"stop has {len(texts)} strings; at most {MAX_STOP_STRINGS} are supported", param="stop")
    return tuple(_text(text, "stop") for text in texts)


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    if isinstance(value, str) or (isinstance(value, list) and value and all(map(is_integer, value))):
        value = [value]
    if not isinstance(value, list) or not value:
        raise ApiError(
            f"prompt is {shown(value)}; wanted a string, a list of token ids, or a non-empty list of either",
            param="prompt",
        )
    prompts: list[str | tuple[int, ...]] = []
    for index, prompt in enumerate(value):
        if isinstance(prompt, str):
            prompts.append(_text(prompt, "prompt"))
        elif isinstance(prompt, list) and all(map(is_integer, prompt)):
            prompts.append(tuple(prompt))
        else:
            raise ApiError(
                f"prompt[{index}] is {shown(prompt)}; wanted a string or a list of token ids", param="prompt"
            )
        if not prompt:
            raise ApiError(f"prompt {index} is empty; wanted at least one token", param="prompt")
    return tuple(prompts)


def _tools(values: Mapping[str, Any]) -> list[Any]:
    """Returns the tools to offer; whether they are tools is checked when they are rendered."""
    flag(values, "parallel_tool_calls")  # an answer has one call in any case, for a call ends it
    tools, choice = values.get("tools", []), values.get("tool_choice", "auto")
    if not isinstance(tools, list):
        raise ApiError(f"tools is {shown(tools)}; wanted a list of functions", param="tools")
    if choice not in ("none", "auto"):
        raise ApiError(
            f"tool_choice is {shown(choice)}; calls cannot be forced: use auto or none, or leave it out",
            param="tool_choice",
            code="unsupported_value",
        )
    return tools if choice == "auto" else []


def _messages(value: Any) -> list[dict[str, Any]]:
    """Returns messages with plain text contents; whether they make a prompt is checked when they are rendered."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise ApiError(f"messages is {shown(value)}; wanted a list of role and content objects", param="messages")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(value)]


def _message(message: dict[str, Any], name: str) -> dict[str, Any]:
    role = message.get("role")
    known = ("role", "content", *(_FIELDS.get(role, ()) if isinstance(role, str) else ()))
    for key, value in message.items():
        if key not in known and value not in (None, []):
            raise ApiError(f"{name} has {shown(key)} {shown(value)}; supported: {', '.join(known)}", param="messages")
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.keys() != {"type", "text"} or part["type"] != "text":
                raise ApiError(f"{name} has a content part {shown(part)}; supported: text parts", param="messages")
        content = "".join(_text(part["text"], "messages") for part in content)
    if isinstance(content, str):
        content = _text(content, "messages")
    more = {key: message[key] for key in known[2:] if message.get(key)}
    return {"role": role, "content": content, **more}


def _text(value: Any, param: str) -> str:
    if not isinstance(value, str):
        raise ApiError(f"{param} has {shown(value)} for a text; wanted a string", param=param)
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which no tokenizer takes
        raise ApiError(f"{param} is not valid Unicode ({error}); correct the text", param=param) from error
    return value


def _same(value: Any, other: Any) -> bool:
    return isinstance(value, bool) == isinstance(other, bool) and value == other
