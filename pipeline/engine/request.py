"""What an engine is asked, and what it answers."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to continue by at most `max_new_tokens` tokens.

    `sampling_key` (`sampling.key_of`) is given where tokens are sampled, and only there.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    sampling_key: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForcedRequest(Request):
    """A prompt with its whole answer, of `max_new_tokens` tokens: what the target is taken to choose."""

    forced_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepUpdate:
    """What one step gave one request.

    `num_accepted` counts the drafted tokens that a DFLASH round accepted; None for prefill and plain steps.
    """

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    num_accepted: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """A request's whole answer; `accepted_per_round` has one entry for each DFLASH round."""

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: str
    accepted_per_round: tuple[int, ...]
