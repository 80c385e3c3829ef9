"""How a request chooses its tokens, as a person asks for it."""

import dataclasses
import math

import numpy as np

from pipeline.errors import PipelineError
from pipeline.model.layers.token_rules import MAX_BIASES, MAX_LOGPROBS, MAX_STOPS, TokenRules

COLDEST = 1e-5  # below it float32 overflows, and the most likely token is drawn anyway


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Holds how a request chooses its tokens; the default is the most likely one each time.

    Names and ranges are OpenAI's and vLLM's. `key` decides what is drawn, with the model and the prompt
    (`sampling.sampling_key`). `stop_token_ids` None are the engine's own; `min_tokens` are generated before one of them
    may be. `logprobs` is how many of the most likely tokens are reported with each one, None for nothing, and
    `prompt_logprobs` the same for the prompt's tokens. Raises PipelineError that lists every value out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    key: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        """Checks the values."""
        values = {
            "temperature": (self.temperature, 0 <= self.temperature < math.inf, "0 or more"),
            "top_p": (self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k, self.top_k >= 0, "0 (all tokens) or more"),
            "min_p": (self.min_p, 0 <= self.min_p <= 1, "from 0 to 1"),
            "frequency_penalty": (self.frequency_penalty, -2 <= self.frequency_penalty <= 2, "from -2 to 2"),
            "presence_penalty": (self.presence_penalty, -2 <= self.presence_penalty <= 2, "from -2 to 2"),
            "repetition_penalty": (self.repetition_penalty, 0 < self.repetition_penalty < math.inf, "above 0"),
            "min_tokens": (self.min_tokens, self.min_tokens >= 0, "0 or more"),
        }
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            values[name] = (value, 0 <= (value or 0) <= MAX_LOGPROBS, f"from 0 to {MAX_LOGPROBS}")
        wrong = [f"{name} is {value}; it must be {text}" for name, (value, holds, text) in values.items() if not holds]
        if len(self.logit_bias) > MAX_BIASES:
            wrong.append(f"logit_bias has {len(self.logit_bias)} tokens; it may have {MAX_BIASES}")
        wrong += [
            f"logit_bias of token {token} is {bias}; it must be from -100 to 100"
            for token, bias in self.logit_bias
            if not -100 <= bias <= 100
        ]
        if len(self.stop_token_ids or ()) > MAX_STOPS:
            wrong.append(f"stop_token_ids has {len(self.stop_token_ids or ())} tokens; it may have {MAX_STOPS}")
        if wrong:
            raise PipelineError("\n  ".join(wrong))

    @property
    def is_penalised(self) -> bool:
        """Whether what was written before changes what is chosen."""
        return self.frequency_penalty != 0 or self.presence_penalty != 0 or self.repetition_penalty != 1

    @property
    def is_plainly_greedy(self) -> bool:
        """Whether it chooses the most likely token each time, with nothing else; it may have stop tokens of its own."""
        return dataclasses.replace(self, stop_token_ids=None, key=(0, 0)) == GREEDY

    @property
    def named_tokens(self) -> tuple[int, ...]:
        """The tokens that it names, which the target must know."""
        return (*(token for token, _ in self.logit_bias), *(self.stop_token_ids or ()))


GREEDY = SamplingParams()


def set_row(rules: TokenRules, row: int, params: SamplingParams, stops: tuple[int, ...], prompt_tokens: int) -> None:
    """Writes a request's rules into a row of NumPy arrays; `stops` are its stop tokens."""
    for name, value in {
        "temperature": 0.0 if params.temperature < COLDEST else params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": params.min_p,
        "frequency": params.frequency_penalty,
        "presence": params.presence_penalty,
        "repetition": params.repetition_penalty,
        "keys": params.key,
        "least_length": prompt_tokens + params.min_tokens if params.min_tokens else 0,
        "num_logprobs": -1 if params.logprobs is None else params.logprobs,
    }.items():
        getattr(rules, name)[row] = value
    for name, values in {
        "stop_ids": stops,
        "bias_ids": [token for token, _ in params.logit_bias],
        "biases": [bias for _, bias in params.logit_bias],
    }.items():
        getattr(rules, name)[row, : len(values)] = values


def history_of(tokens: list[int], prompt_tokens: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns how often each token was generated, int32 [V], and which ones the prompt has, bool [V]."""
    in_prompt = np.zeros(vocab_size, bool)
    in_prompt[tokens[:prompt_tokens]] = True
    return np.bincount(tokens[prompt_tokens:], minlength=vocab_size).astype(np.int32), in_prompt
