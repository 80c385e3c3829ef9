"""The fields that both kinds of completions have: how tokens are chosen, where an answer ends, how it is sent."""

from typing import Annotated, Any

from pydantic import Field, PlainValidator, WithJsonSchema

from pipeline.engine.sampling_params import SamplingParams
from pipeline.errors import PipelineError
from pipeline.serve.errors import ApiError
from pipeline.serve.schema.fields import Body, Unserved, Wanted, shown, valid_text
from pipeline.serve.schema.format_fields import (
    GuidedChoice,
    GuidedGrammar,
    GuidedJson,
    GuidedRegex,
    ResponseFormat,
    StructuredOutputs,
)

MAX_STOP_STRINGS = 16
MAX_ANSWERS = 128  # of one request, over all its prompts
FORMS = (
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
)
NUMBERS = ("top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "min_tokens")

UNSERVED: Unserved = {
    "length_penalty": ((1,), "beams are not searched: use 1 or leave it out"),
    "use_beam_search": ((False,), "beams are not searched: use false or leave it out"),
    "early_stopping": ((False,), "beams are not searched: use false or leave it out"),
    "prompt_logprobs": ((), "a prompt's log probabilities come with echo and logprobs of /v1/completions"),
    "include_stop_str_in_output": ((False,), "a stop string is never part of an answer: use false or leave it out"),
    "truncate_prompt_tokens": ((), "prompts are not truncated: shorten the prompt, or leave it out"),
    "spaces_between_special_tokens": ((True, False), "leave it out"),
    "detokenize": ((True,), "answers are text: use true or leave it out; return_token_ids adds their tokens"),
    "priority": ((0,), "requests have no priorities: use 0 or leave it out"),
    "guided_decoding_backend": (("auto", "guidance"), "llguidance is used: leave it out"),
}


def _stop(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise ApiError(f"stop is {shown(value)}; wanted a non-empty string or a list of them", param="stop")
    if len(texts) > MAX_STOP_STRINGS:
        raise ApiError(f"stop has {len(texts)} strings; at most {MAX_STOP_STRINGS} are supported", param="stop")
    return tuple(valid_text(text, "stop") for text in texts)


def _biases(value: Any) -> tuple[tuple[int, float], ...]:
    wanted = "wanted an object with token ids and numbers from -100 to 100"
    if not isinstance(value, dict):
        raise ApiError(f"logit_bias is {shown(value)}; {wanted}", param="logit_bias")
    found = []
    for token, bias in value.items():
        if not (token.isascii() and token.isdecimal() and len(token) < 10):
            raise ApiError(f"logit_bias has {shown(token)}; {wanted}", param="logit_bias")
        if isinstance(bias, bool) or not isinstance(bias, int | float):
            raise ApiError(f"logit_bias is {shown(bias)}; wanted a number", param="logit_bias")
        found.append((int(token), float(min(max(bias, -1000), 1000))))  # beyond 100 in any case, and a float holds it
    return tuple(found)


Count = Annotated[int, Field(ge=1), Wanted("a whole number of at least 1")]
Number = Annotated[float, Wanted("a number")]
Stop = Annotated[
    tuple[str, ...],
    PlainValidator(_stop),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": MAX_STOP_STRINGS},
            ]
        }
    ),
]
Biases = Annotated[
    tuple[tuple[int, float], ...],
    PlainValidator(_biases),
    WithJsonSchema(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        }
    ),
]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63), Wanted("a whole number of 64 bits")]
Ignored = Annotated[Any, Field(description="Accepted; changes nothing.")]


class StreamOptions(Body):
    """What a stream carries beside its text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Options(Body):
    """Holds what completions and chat completions have in common."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS), Wanted(f"a whole number from 1 to {MAX_ANSWERS}")] = 1
    best_of: Annotated[int | None, Wanted("the same as n, or nothing")] = None
    stop: Stop = ()
    seed: Seed | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: int | None = None
    min_p: Number | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    repetition_penalty: Number | None = None
    min_tokens: int | None = None
    logit_bias: Biases = ()
    ignore_eos: bool = False
    stop_token_ids: Annotated[list[int], Wanted("a list of token ids")] = Field(default_factory=list)
    response_format: ResponseFormat = None
    structured_outputs: StructuredOutputs = None
    guided_json: GuidedJson = None
    guided_regex: GuidedRegex = None
    guided_choice: GuidedChoice = None
    guided_grammar: GuidedGrammar = None
    skip_special_tokens: bool = True
    return_token_ids: bool = False
    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    request_id: Ignored = None

    @property
    def form(self) -> str | None:
        """The form that the answer's text must have (`forms`), None for any."""
        return None if self.form_param is None else getattr(self, self.form_param)

    @property
    def form_param(self) -> str | None:
        """The field that says which form; None where none does."""
        return next((name for name in FORMS if getattr(self, name) is not None), None)

    @property
    def streams_usage(self) -> bool:
        """Whether a stream ends with what was used."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def streams_usage_always(self) -> bool:
        """Whether each chunk of a stream says what was used so far."""
        return self.streams_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)


def require_consistent(options: Options, num_prompts: int) -> None:
    """Raises ApiError for fields that contradict each other."""
    if options.stream_options is not None and options.stream_options.model_fields_set and not options.stream:
        raise ApiError("stream_options is given without stream; set stream to true", param="stream_options")
    if options.best_of not in (None, options.n):
        raise ApiError(
            f"best_of is {options.best_of} and n is {options.n}; answers are not chosen from more than are returned: "
            "use the same number, or leave best_of out",
            param="best_of",
            code="unsupported_value",
        )
    asked = [name for name in FORMS if getattr(options, name) is not None]
    if len(asked) > 1:
        raise ApiError(f"{' and '.join(asked)} each say what form the answer has; give one of them", param=asked[1])
    if asked and options.ignore_eos:
        raise ApiError(
            f"ignore_eos is true and {asked[0]} says where the answer ends; leave either out", param="ignore_eos"
        )
    if options.n * num_prompts > MAX_ANSWERS:
        raise ApiError(
            f"{num_prompts} prompts with n={options.n} want {options.n * num_prompts} answers; one request gets at "
            f"most {MAX_ANSWERS}: send several requests",
            param="n",
        )


def sampling_of(
    options: Options, stops: tuple[int, ...], default_temperature: float, logprobs: int | None
) -> SamplingParams:
    """Returns how an answer's tokens are chosen, without its key; raises ApiError naming the first wrong field.

    `stops` are the model's stop tokens, which `stop_token_ids` adds to and `ignore_eos` leaves out.
    """
    found: dict[str, Any] = {name: getattr(options, name) for name in NUMBERS if getattr(options, name) is not None}
    found["temperature"] = default_temperature if options.temperature is None else options.temperature
    if options.top_k is not None:
        found["top_k"] = 0 if options.top_k == -1 else options.top_k  # -1 is vLLM's word for all tokens
    if options.logit_bias:
        found["logit_bias"] = options.logit_bias
    more = tuple(options.stop_token_ids)
    if options.ignore_eos:
        found["stop_token_ids"] = more
    elif more:
        found["stop_token_ids"] = (*stops, *more)
    for name in ("top_k", "min_tokens"):
        if found.get(name, 0) >= 2**31:
            raise ApiError(f"{name} is {shown(found[name])}; wanted a whole number of 32 bits", param=name)
    for name, value in found.items():
        try:
            SamplingParams(**{name: value})
        except PipelineError as error:
            raise ApiError(str(error), param=name) from error
    return SamplingParams(**found, logprobs=logprobs)
