"""Writes requests to an OpenAI-compatible endpoint, and reads the tokens of its replies."""

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.errors import PipelineError
from pipeline.model.layers.sampling import sampling_key
from pipeline.prompts.chat_format import chat_format_of, stop_token_ids
from pipeline.prompts.harmony import render_completion
from pipeline.prompts.sources import Prompt
from pipeline.prompts.tokenizer import Tokenizer, control_token_problem, special_token_ids
from pipeline.prompts.tools import tool_calls_of, tool_calls_problem
from pipeline.teacher_cache.origin import AnswerOrigin
from pipeline.teacher_cache.render import RenderedPrompt

STOPPED, CUT = ("stop", "tool_calls", "function_call"), "length"
SHOWN_CHARACTERS = 200


class EndpointApi(enum.Enum):
    """Names an endpoint's API: `chat` exchanges messages and text, `completions` exact tokens."""

    chat = "/chat/completions"
    completions = "/completions"


class BadReply(Exception):
    """Reports a reply that is no answer to its prompt; the message says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestTemplate:
    """Holds what all requests have in common; `extra` are further fields that the endpoint knows."""

    api: EndpointApi
    model: str
    origin: AnswerOrigin
    max_new_tokens: int
    has_efforts: bool
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def body(self, row: RenderedPrompt) -> dict[str, Any]:
        """Returns the JSON body of the request for a prompt."""
        body: dict[str, Any] = {"model": self.model, "max_tokens": self.max_new_tokens}
        sampling = self.origin.sampling
        if sampling is None:
            body["temperature"] = 0
        else:
            seed = sampling_key(self.origin.seed, row.prompt.prompt_id)[0] >> 1  # 31 bits: some take a signed int32
            body |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": seed}
        if self.api is EndpointApi.completions:
            return body | {"prompt": list(row.token_ids), "return_token_ids": True, **self.extra}
        body["messages"] = _messages(row.prompt)
        if row.prompt.tools:
            body["tools"] = [tool.as_dict() for tool in row.prompt.tools]
        if self.has_efforts:
            body["reasoning_effort"] = row.prompt.effort
        return {**body, **self.extra}


def _messages(prompt: Prompt) -> list[dict[str, Any]]:
    """Returns a prompt's messages as the API wants them: calls get ids, thinking becomes `reasoning_content`."""
    messages = [message.as_dict() for message in prompt.messages]
    for index, message in enumerate(messages):
        if "thinking" in message:
            message["reasoning_content"] = message.pop("thinking")
        for call in message.get("tool_calls", ()):
            call["id"] = f"call_{index}"
        if message["role"] == "tool":
            message["tool_call_id"] = f"call_{index - 1}"  # a result follows its call directly
    return messages


def reply_fields(reply: Any, api: EndpointApi) -> dict[str, Any]:
    """Returns the fields of a reply that decide its tokens; raises BadReply when it holds no answer."""
    choices = reply.get("choices") if isinstance(reply, Mapping) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
        raise BadReply(f"the reply has no choices: {_shown(reply)}")
    choice = choices[0]
    fields = {name: choice.get(name) for name in ("finish_reason", "token_ids")}
    if fields["finish_reason"] not in (*STOPPED, CUT):
        raise BadReply(f"the answer ended with {_shown(choice.get('finish_reason'))}; wanted stop or length")
    if api is EndpointApi.chat and not isinstance(choice.get("message"), Mapping):
        raise BadReply(f"the reply has no message: {_shown(choice)}")
    if api is EndpointApi.chat:
        names = ("content", "reasoning_content", "reasoning", "tool_calls")
        fields["message"] = {name: choice["message"].get(name) for name in names}
    elif fields["token_ids"] is None:
        raise BadReply("the reply has no token_ids; this endpoint needs teacher_cache.openai.api=chat")
    usage = reply.get("usage")
    fields["num_prompt_tokens"] = usage.get("prompt_tokens") if isinstance(usage, Mapping) else None
    fields["prompt_token_ids"] = choice.get("prompt_token_ids") or reply.get("prompt_token_ids")
    return fields


class ReplyReader:
    """Turns replies into tokens of the target's chat format."""

    def __init__(self, tokenizer: Tokenizer, max_new_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._format = chat_format_of(tokenizer)
        self._stops = stop_token_ids(tokenizer)
        self._vocabulary = len(tokenizer)
        self._max_new_tokens = max_new_tokens

    def tokens(self, fields: Mapping[str, Any]) -> tuple[tuple[int, ...], str]:
        """Returns the answer's tokens, and "stop" or "length", from the `reply_fields` of a reply.

        Tokens that the endpoint reports are taken as they are. Otherwise its text is rendered as the model writes it,
        ended by the token that ends a turn unless the text was cut off. Raises BadReply.
        """
        was_cut = fields["finish_reason"] == CUT
        if fields["token_ids"] is not None:
            tokens = self._reported(fields["token_ids"])
        else:
            tokens = self._rendered(fields["message"], was_cut)
        if not tokens:
            raise BadReply("the answer is empty")
        tokens = tokens[: self._max_new_tokens]
        return tuple(tokens), "stop" if tokens[-1] in self._stops else CUT

    def _reported(self, token_ids: Any) -> list[int]:
        if not isinstance(token_ids, list) or not all(
            isinstance(token, int) and 0 <= token < self._vocabulary for token in token_ids
        ):
            raise BadReply(f"token_ids is {_shown(token_ids)}; wanted ids from 0 to {self._vocabulary - 1}")
        ends = [index for index, token in enumerate(token_ids) if token in self._stops]
        return token_ids[: ends[0] + 1] if ends else token_ids

    def _rendered(self, message: Mapping[str, Any], was_cut: bool) -> list[int]:
        content = self._text(message, "content")
        analysis = self._text(message, "reasoning_content", "reasoning")
        calls = message["tool_calls"] or []
        if not (content or analysis or calls):
            raise BadReply("the answer is empty")
        if not self._format.has_channels:
            return self._plain(content, analysis, calls, was_cut)
        if was_cut and calls:
            raise BadReply("the answer was cut off in a tool call, whose tokens its text does not tell")
        if not (content or calls or was_cut):
            raise BadReply("the answer has reasoning alone, and no final text")
        try:
            problem = tool_calls_problem(calls) if calls else None
            if problem is not None:
                raise BadReply(f"the answer {problem}")
            tokens = render_completion(
                self._tokenizer,
                analysis or None,
                content or (None if calls else ""),
                tool_calls=tool_calls_of(calls),
            )
        except PipelineError as error:
            raise BadReply(str(error)) from error
        if not was_cut:
            return tokens
        end = "<|return|>" if content else "<|end|>"  # the first <|end|> closes the analysis, which spells none
        return tokens[: tokens.index(special_token_ids(self._tokenizer, [end])[0])]

    def _plain(self, content: str, analysis: str, calls: Sequence[Any], was_cut: bool) -> list[int]:
        problem = control_token_problem(self._tokenizer, [content])
        if calls or analysis:
            problem = f"the answer has {'tool calls' if calls else 'reasoning'}, which the target's format has not"
        if problem is not None:
            raise BadReply(problem)
        tokens = self._tokenizer.encode(content, add_special_tokens=False)
        return tokens if was_cut else [*tokens, self._stops[0]]

    def _text(self, message: Mapping[str, Any], *names: str) -> str:
        found = next((message[name] for name in names if message[name]), "")
        if not isinstance(found, str):
            raise BadReply(f"{' or '.join(names)} is {_shown(found)}; wanted text")
        return found


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."
