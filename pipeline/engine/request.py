"""The requests that an engine takes, and what it returns for them."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """Holds a prompt to continue by at most `max_new_tokens` tokens.

    `sampling_key` (`sampling.sampling_key`) is set where tokens are sampled, and only there.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    sampling_key: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForcedRequest(Request):
    """Holds a prompt and its whole answer, `max_new_tokens` tokens that stand for the target's choices."""

    forced_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepUpdate:
    """Holds what one step gave one request.

    `finish_reason` is "stop" or "length", or None while the request goes on. `num_accepted`
    counts the drafted tokens that a DFLASH round accepted; None for prefill and plain steps.
    """

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    num_accepted: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """Holds a request's whole answer; `accepted_per_round` has one number for each DFLASH round."""

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: str
    accepted_per_round: tuple[int, ...]
