"""An engine whose answers a script gives, with the real one's interface, for tests of what is around it."""

import dataclasses
import time
from collections.abc import Callable, Sequence

from pipeline.dflash.acceptance import Acceptance
from pipeline.engine.block_choice import Estimate
from pipeline.engine.config import EngineConfig
from pipeline.engine.engine import Engine
from pipeline.engine.request import Request, StepUpdate, TokenLogProb
from pipeline.engine.step_counts import StepCounts
from pipeline.errors import PipelineError

VOCABULARY = 512


@dataclasses.dataclass
class Running:
    request: Request
    tokens: list[int]
    at: int = 0


class FakeEngine(Engine):
    """`script` gives a request's tokens, its stop token last; a round yields up to `round_tokens` of them."""

    def __init__(
        self,
        script: Callable[[Request], Sequence[int]],
        stop_ids: Sequence[int],
        *,
        round_tokens: int = 3,
        block_size: int | None = 8,
        slots: int = 4,
        max_length: int = 200,
    ) -> None:
        self.script, self.round_tokens, self.block_size = script, round_tokens, block_size
        self.config = EngineConfig(
            num_slots=slots, max_length=max_length, prefill_chunk=16, stop_token_ids=tuple(stop_ids)
        )
        self._counts, self.num_preempted = StepCounts(block_size, (block_size or 1,), (slots,)), 0
        self.waiting: list[Request] = []
        self.running: dict[str, Running] = {}
        self.cancelled: list[str] = []
        self.most_running = 0
        self.step_seconds = 0.0
        self.failure: Exception | None = None

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def vocab_size(self) -> int:
        return VOCABULARY

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    @property
    def num_running(self) -> int:
        return len(self.running)

    num_pages = 40

    @property
    def num_free_pages(self) -> int:
        return 40 - self.num_running

    @property
    def block_estimates(self) -> dict[int, Estimate]:
        return {}

    def warm_up(self, on_compiled: Callable[[str], None] = lambda name: None) -> None:
        pass

    def check(self, request: Request) -> None:
        if not request.prompt_ids or len(request.prompt_ids) + request.max_new_tokens > self.config.max_length:
            raise PipelineError("prompt does not fit")
        if max(request.prompt_ids) >= VOCABULARY:
            raise PipelineError(f"prompt has token ids {[max(request.prompt_ids)]}; the target knows 0..511")

    def add_all(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.check(request)
        self.waiting += requests

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)
        self.running.pop(request_id, None)
        self.waiting = [one for one in self.waiting if one.request_id != request_id]

    def step(self) -> list[StepUpdate]:
        time.sleep(self.step_seconds)
        if self.failure is not None:
            raise self.failure
        updates = []
        while self.waiting and len(self.running) < self.config.num_slots:
            request = self.waiting.pop(0)
            self.running[request.request_id] = Running(request, list(self.script(request))[: request.max_new_tokens])
            updates.append(self._advance(request.request_id, 1, is_round=False))
        self.most_running = max(self.most_running, len(self.running))
        for request_id in list(self.running):
            updates.append(self._advance(request_id, self.round_tokens, is_round=self.block_size is not None))
        return updates

    def _advance(self, request_id: str, count: int, *, is_round: bool) -> StepUpdate:
        one = self.running[request_id]
        new = tuple(one.tokens[one.at : one.at + count])
        one.at += len(new)
        reason = None
        if one.at == len(one.tokens):
            reason = "stop" if new[-1] in self.config.stop_token_ids else "length"
            del self.running[request_id]
        if is_round:
            self._counts.acceptance += Acceptance.of([len(new) - 1], self.block_size)
        num_accepted = len(new) - 1 if is_round else None
        return StepUpdate(
            request_id=request_id,
            token_ids=new,
            finish_reason=reason,
            num_accepted=num_accepted,
            num_drafted=self.block_size - 1 if is_round and self.block_size is not None else None,
            log_probs=log_probs_of(new, one.request.sampling.logprobs),
            prompt_log_probs=()
            if is_round
            else log_probs_of(one.request.prompt_ids[1:], one.request.sampling.prompt_logprobs),
        )


def log_probs_of(tokens: Sequence[int], count: int | None) -> tuple[TokenLogProb, ...]:
    """Of tokens the log probability -token/1000, and as the likeliest ones the tokens 0 to `count` - 1, each -0.5."""
    if count is None:
        return ()
    return tuple(TokenLogProb(token, -token / 1000, tuple((index, -0.5) for index in range(count))) for token in tokens)
