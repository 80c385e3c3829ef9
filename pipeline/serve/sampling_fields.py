"""Reads from a request's body how its tokens are chosen: OpenAI's fields and vLLM's."""

import secrets
from collections.abc import Mapping
from typing import Any

from pipeline.engine.sampling_params import SamplingParams
from pipeline.errors import PipelineError
from pipeline.model.layers.sampling import sampling_key
from pipeline.serve.errors import ApiError
from pipeline.serve.values import flag, is_integer, shown

NUMBERS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
COUNTS = ("top_k", "min_tokens")
FIELDS = (*NUMBERS, *COUNTS, "logit_bias", "seed", "ignore_eos", "stop_token_ids")


def read_sampling(values: Mapping[str, Any], stops: tuple[int, ...]) -> SamplingParams:
    """Returns how a body's tokens are chosen, without its key; raises ApiError naming the first wrong field.

    `stops` are the model's stop tokens, which `stop_token_ids` adds to and `ignore_eos` leaves out. Without a
    temperature tokens are the most likely ones.
    """
    found: dict[str, Any] = {name: _number(values[name], name) for name in NUMBERS if name in values}
    found |= {name: _whole(values[name], name) for name in COUNTS if name in values}
    if found.get("top_k") == -1:  # vLLM's word for all tokens
        found["top_k"] = 0
    if "logit_bias" in values:
        found["logit_bias"] = _biases(values["logit_bias"])
    _whole(values.get("seed", 0), "seed")
    more = _tokens(values.get("stop_token_ids", []))
    if flag(values, "ignore_eos"):
        found["stop_token_ids"] = more
    elif more:
        found["stop_token_ids"] = (*stops, *more)
    for name, value in found.items():
        try:
            SamplingParams(**{name: value})
        except PipelineError as error:
            raise ApiError(str(error), param=name) from error
    return SamplingParams(**found)


def key_of(seed: int | None, index: int) -> tuple[int, int]:
    """Returns the key of a request's prompt number `index`: the seed's, or one that nobody can foresee."""
    return sampling_key(secrets.randbits(63) if seed is None else seed, f"prompt {index}")


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ApiError(f"{name} is {shown(value)}; wanted a number", param=name)
    try:
        return float(value)
    except OverflowError as error:
        raise ApiError(f"{name} is {shown(value)}; wanted a number that a float can hold", param=name) from error


def _whole(value: Any, name: str) -> int:
    if not is_integer(value):
        raise ApiError(f"{name} is {shown(value)}; wanted a whole number", param=name)
    if not -(2**63) <= value < 2**63:
        raise ApiError(f"{name} is {shown(value)}; wanted a whole number of 64 bits", param=name)
    return value


def _tokens(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise ApiError(f"stop_token_ids is {shown(value)}; wanted a list of token ids", param="stop_token_ids")
    return tuple(_whole(token, "stop_token_ids") for token in value)


def _biases(value: Any) -> tuple[tuple[int, float], ...]:
    wanted = "wanted an object with token ids and numbers from -100 to 100"
    if not isinstance(value, dict):
        raise ApiError(f"logit_bias is {shown(value)}; {wanted}", param="logit_bias")
    found = []
    for token, bias in value.items():
        if not (token.isascii() and token.isdecimal() and len(token) < 10):
            raise ApiError(f"logit_bias has {shown(token)}; {wanted}", param="logit_bias")
        found.append((int(token), _number(bias, "logit_bias")))
    return tuple(found)
