"""Writes requests to an OpenAI-compatible endpoint, and reads the tokens of its replies."""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

from pipeline.model.layers.sampling import sampling_key
from pipeline.prompts.sources import Prompt
from pipeline.teacher_cache.answer_reader import CUT, STOP, AnswerReader, AnswerTokens, BadAnswer, shortened
from pipeline.teacher_cache.origin import AnswerOrigin
from pipeline.teacher_cache.render import RenderedPrompt

STOPPED = (STOP, "tool_calls", "function_call")


class EndpointApi(enum.Enum):
    """Names an endpoint's API: `chat` exchanges messages and text, `completions` exact tokens."""

    chat = "/chat/completions"
    completions = "/completions"


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
    """Returns the fields of a reply that decide its tokens; raises BadAnswer when it holds no answer."""
    choices = reply.get("choices") if isinstance(reply, Mapping) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
        raise BadAnswer(f"the reply has no choices: {shortened(reply)}")
    choice = choices[0]
    fields = {name: choice.get(name) for name in ("finish_reason", "token_ids")}
    if fields["finish_reason"] not in (*STOPPED, CUT):
        raise BadAnswer(f"the answer ended with {shortened(choice.get('finish_reason'))}; wanted stop or length")
    if api is EndpointApi.chat and not isinstance(choice.get("message"), Mapping):
        raise BadAnswer(f"the reply has no message: {shortened(choice)}")
    if api is EndpointApi.chat:
        names = ("content", "reasoning_content", "reasoning", "tool_calls")
        fields["message"] = {name: choice["message"].get(name) for name in names}
    elif fields["token_ids"] is None:
        raise BadAnswer("the reply has no token_ids; this endpoint needs teacher_cache.openai.api=chat")
    usage = reply.get("usage")
    fields["num_prompt_tokens"] = usage.get("prompt_tokens") if isinstance(usage, Mapping) else None
    fields["prompt_token_ids"] = choice.get("prompt_token_ids") or reply.get("prompt_token_ids")
    return fields


def reply_tokens(fields: Mapping[str, Any], reader: AnswerReader) -> AnswerTokens:
    """Returns an answer's tokens, and "stop" or "length", from the `reply_fields` of a reply.

    Tokens that the endpoint reports are taken as they are, otherwise its text is rendered. Raises BadAnswer.
    """
    if fields["token_ids"] is not None:
        return reader.reported(fields["token_ids"])
    return reader.rendered(fields["message"], was_cut=fields["finish_reason"] == CUT)
