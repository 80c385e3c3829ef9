"""A running server as an arm of the benchmark: the same requests, timed by the client, some at once."""

import concurrent.futures
import itertools
import time
from collections.abc import Callable, Sequence

from pipeline.bench.arms import ArmPass
from pipeline.bench.timeline import Timeline
from pipeline.dflash.acceptance import Acceptance
from pipeline.engine.request import Completion, Request
from pipeline.external.token_endpoint import DraftCounts, TimedAnswer, TokenEndpoint

WARM_UP_TOKENS = 16


class EndpointArm:
    """Sends requests to a server, `num_at_once` at a time, greedily.

    Times are the client's. One at a time, decoding runs from the first token of each answer to its last; several at
    once, from the first request to the last token, prompts included, for the server does both at once. `block_size`
    is the draft's, None for a server that has none.
    """

    def __init__(
        self, endpoint: TokenEndpoint, num_at_once: int, stop_token_ids: tuple[int, ...], block_size: int | None
    ) -> None:
        self.block_size = block_size
        self._endpoint, self._num_at_once, self._stop_token_ids = endpoint, num_at_once, stop_token_ids
        self._before: DraftCounts | None = None

    def warm_up(self, on_compiled: Callable[[str], None] = lambda name: None) -> None:
        """Sends a short request at every number of requests at once, so that the server has compiled its programs."""
        for count in sorted({1, self._num_at_once}):
            prompts = [[token % 50 + 5 for token in range(index + 8)] for index in range(count)]
            with concurrent.futures.ThreadPoolExecutor(count) as pool:
                list(pool.map(lambda ids: self._endpoint.answer(ids, WARM_UP_TOKENS, self._stop_token_ids), prompts))
            on_compiled(f"{count} at once")
        self._before = self._endpoint.counts()

    def run(self, requests: Sequence[Request], arrivals: Sequence[float] | None = None) -> ArmPass:
        """Sends requests, each as soon as another has ended, or `arrivals` seconds after the beginning.

        The server does not say what its rounds accepted, request by request.
        """
        started = time.perf_counter()
        at_once = self._num_at_once if arrivals is None else len(requests)
        due = [None] * len(requests) if arrivals is None else [started + seconds for seconds in arrivals]
        with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
            found = list(pool.map(self._answer, requests, due))
        seconds, first = time.perf_counter() - started, sum(one.first_seconds for one, _ in found)
        is_single = at_once == 1
        pairs = list(zip(requests, found, strict=True))
        return ArmPass(
            answers={request.request_id: _completion(request, one) for request, (one, _) in pairs},
            timelines={
                request.request_id: Timeline(
                    submitted=at, arrivals=tuple((at + later, count) for later, count in one.arrivals)
                )
                for request, (one, at) in pairs
            },
            decode_tokens=sum(len(one.token_ids) - 1 for one, _ in found),
            decode_seconds=seconds - first if is_single else seconds,
            prefill_seconds=first if is_single else 0.0,
            seconds=seconds,
        )

    def acceptance(self, passes: Sequence[ArmPass]) -> Acceptance:
        """Returns what the server's rounds accepted since the warm-up, by its own counters."""
        return acceptance_between(self._before, self._endpoint.counts(), self.block_size or 1)

    def _answer(self, request: Request, due: float | None) -> tuple[TimedAnswer, float]:
        """Returns the answer to a request, and when it was sent, or ought to have been."""
        if due is not None:
            time.sleep(max(due - time.perf_counter(), 0.0))
        sent = time.perf_counter()
        answer = self._endpoint.answer(request.prompt_ids, request.max_new_tokens, self._stop_token_ids)
        return answer, sent


def _completion(request: Request, one: TimedAnswer) -> Completion:
    return Completion(
        request_id=request.request_id,
        token_ids=one.token_ids,
        finish_reason=one.finish_reason,
        accepted_per_round=(),
    )


def acceptance_between(before: DraftCounts | None, after: DraftCounts | None, block_size: int) -> Acceptance:
    """Returns the acceptance of the rounds between two readings of a server's counters; none where it has none."""
    if after is None:
        return Acceptance((0,) * block_size)
    earlier = DraftCounts(0, ()) if before is None else before
    at_k = [_at(after, index) - _at(earlier, index) for index in range(block_size - 1)]
    cumulative = [after.num_rounds - earlier.num_rounds, *at_k, 0]
    return Acceptance(tuple(more - fewer for more, fewer in itertools.pairwise(cumulative)))


def _at(counts: DraftCounts, index: int) -> int:
    return counts.num_accepted_at_k[index] if index < len(counts.num_accepted_at_k) else 0
