"""The requests that an engine takes, and what it returns for them."""

import dataclasses

from pipeline.engine.grammar import Grammar
from pipeline.engine.sampling_params import GREEDY, SamplingParams


@dataclasses.dataclass(frozen=True)
class TokenLogProb:
    """Holds the log probability of a token before any rule, and the most likely tokens there with theirs."""

    token_id: int
    log_prob: float
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """Holds a prompt to continue by at most `max_new_tokens` tokens, chosen as `sampling` says.

    A `grammar` rules out what its answers do not have.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: SamplingParams = GREEDY
    grammar: Grammar | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForcedRequest(Request):
    """Holds a prompt and its whole answer, `max_new_tokens` tokens that stand for the target's choices."""

    forced_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepUpdate:
    """Holds what one step gave one request.

    `finish_reason` is "stop" or "length", or None while the request goes on. `num_accepted`
    counts the drafted tokens that a DFLASH round accepted, of `num_drafted`; None for prefill and plain steps.
    `log_probs` has one for each token where the request asked for them, and `prompt_log_probs`, beside the first token,
    one for each token of the prompt but the first. Of the prompt's tokens `num_reused` were computed for earlier
    requests. `failure` says why the request, and no other, could not go on; its `finish_reason` is "error".
    """

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    num_accepted: int | None = None
    num_drafted: int | None = None
    log_probs: tuple[TokenLogProb, ...] = ()
    prompt_log_probs: tuple[TokenLogProb, ...] = ()
    num_reused: int = 0
    failure: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """Holds a request's whole answer.

    `accepted_per_round` has one number for each DFLASH round, and `log_probs` one for each token where they were asked
    for.
    """

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: str
    accepted_per_round: tuple[int, ...]
    log_probs: tuple[TokenLogProb, ...] = ()
