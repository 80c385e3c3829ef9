"""Bodies of /v1/completions: each prompt is a text or tokens, continued as it is."""

import dataclasses
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainValidator, WithJsonSchema

from pipeline.engine.sampling_params import SamplingParams
from pipeline.model.layers.token_rules import MAX_LOGPROBS
from pipeline.serve.errors import ApiError
from pipeline.serve.schema.fields import Wanted, is_integer, parse, shown, valid_text
from pipeline.serve.schema.options import UNSERVED, Options, require_consistent, sampling_of

DEFAULT_TOKENS = 16  # OpenAI's

_UNSERVED = {
    **UNSERVED,
    "top_logprobs": ((0,), "this is a chat's field: use logprobs"),
    "suffix": (("",), "insertion is not supported: leave it out"),
}
_TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_TEXT = {"type": "string", "minLength": 1}


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
            prompts.append(valid_text(prompt, "prompt"))
        elif isinstance(prompt, list) and all(map(is_integer, prompt)):
            prompts.append(tuple(prompt))
        else:
            raise ApiError(
                f"prompt[{index}] is {shown(prompt)}; wanted a string or a list of token ids", param="prompt"
            )
        if not prompt:
            raise ApiError(f"prompt {index} is empty; wanted at least one token", param="prompt")
    return tuple(prompts)


Prompts = Annotated[
    tuple[str | tuple[int, ...], ...],
    PlainValidator(_prompts),
    WithJsonSchema(
        {"anyOf": [_TEXT, _TOKENS, *({"type": "array", "items": one, "minItems": 1} for one in (_TEXT, _TOKENS))]}
    ),
]
NumLogprobs = Annotated[
    Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None,
    BeforeValidator(lambda value: None if value is False else value),
    Wanted(f"a whole number from 0 to {MAX_LOGPROBS}"),
]


class CompletionBody(Options):
    """Holds a body of /v1/completions."""

    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=0), Wanted("a whole number of at least 1")] = DEFAULT_TOKENS
    echo: bool = False
    logprobs: NumLogprobs = None
    add_special_tokens: bool = False

    def sampling(self, stops: tuple[int, ...], default_temperature: float) -> SamplingParams:
        """Returns how tokens are chosen, without a key; raises ApiError."""
        found = sampling_of(self, stops, default_temperature, self.logprobs)
        return dataclasses.replace(found, prompt_logprobs=self.logprobs) if self.echo else found


def read_completion(body: Any, model: str) -> CompletionBody:
    """Returns the body of a request to /v1/completions for the served `model`; raises ApiError."""
    found = parse(CompletionBody, body, model, _UNSERVED, required=("prompt",))
    require_consistent(found, len(found.prompt))
    if found.max_tokens == 0 and not found.echo:
        raise ApiError("max_tokens is 0; wanted a whole number of at least 1", param="max_tokens")
    return found
