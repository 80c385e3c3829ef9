"""An engine of this process as an arm of the benchmark."""

import time
from collections.abc import Callable, Sequence

from pipeline.bench.arms import ArmPass
from pipeline.bench.timeline import Timeline
from pipeline.dflash import acceptance
from pipeline.dflash.acceptance import Acceptance
from pipeline.engine.engine import Engine
from pipeline.engine.request import Completion, Request


class EngineArm:
    """Runs requests through an engine, and notes when their tokens become known."""

    def __init__(self, engine: Engine) -> None:
        self.block_size = engine.block_size
        self._engine = engine

    def warm_up(self, on_compiled: Callable[[str], None] = lambda name: None) -> None:
        """Compiles every step of the engine."""
        self._engine.warm_up(on_compiled)

    def run(self, requests: Sequence[Request], arrivals: Sequence[float] | None = None) -> ArmPass:
        """Runs requests, each as soon as a slot is free, or `arrivals` seconds after the beginning."""
        engine, answers = self._engine, _Answers()
        before, started, index = engine.times, time.perf_counter(), 0
        while index < len(requests) or engine.has_work:
            now = time.perf_counter()
            while index < len(requests) and self._is_due(index, now - started, arrivals):
                engine.add(requests[index])
                answers.begin(requests[index], now if arrivals is None else started + arrivals[index])
                index += 1
            if engine.has_work:
                answers.take(engine)
            elif arrivals is not None and index < len(requests):
                time.sleep(max(started + arrivals[index] - time.perf_counter(), 0.0))
        after, seconds = engine.times, time.perf_counter() - started
        return ArmPass(
            answers=answers.completions,
            timelines=answers.timelines(),
            decode_tokens=after.decode_tokens - before.decode_tokens,
            decode_seconds=after.decode_seconds - before.decode_seconds,
            prefill_seconds=after.prefill_seconds - before.prefill_seconds,
            seconds=seconds,
        )

    def acceptance(self, passes: Sequence[ArmPass]) -> Acceptance:
        """Returns what the rounds of one pass accepted, for decoding repeats itself."""
        rounds = [count for answer in passes[0].answers.values() for count in answer.accepted_per_round]
        size = self.block_size or 1
        return Acceptance.of(rounds, size) if rounds else acceptance.empty(size)

    def _is_due(self, index: int, elapsed: float, arrivals: Sequence[float] | None) -> bool:
        if arrivals is not None:
            return arrivals[index] <= elapsed
        return self._engine.num_running + self._engine.num_waiting < self._engine.config.num_slots


class _Answers:
    """Collects the answers of requests, step by step."""

    def __init__(self) -> None:
        self.completions: dict[str, Completion] = {}
        self._submitted: dict[str, float] = {}
        self._arrivals: dict[str, list[tuple[float, int]]] = {}
        self._tokens: dict[str, list[int]] = {}
        self._accepted: dict[str, list[int]] = {}

    def begin(self, request: Request, at: float) -> None:
        name = request.request_id
        self._submitted[name], self._arrivals[name], self._tokens[name], self._accepted[name] = at, [], [], []

    def take(self, engine: Engine) -> None:
        """Runs a step, and adds what it gave."""
        updates, now = engine.step(), time.perf_counter()
        for update in updates:
            name = update.request_id
            self._tokens[name] += update.token_ids
            self._arrivals[name].append((now, len(update.token_ids)))
            if update.num_accepted is not None:
                self._accepted[name].append(update.num_accepted)
            if update.finish_reason is not None:
                self.completions[name] = Completion(
                    request_id=name,
                    token_ids=tuple(self._tokens[name]),
                    finish_reason=update.finish_reason,
                    accepted_per_round=tuple(self._accepted[name]),
                )

    def timelines(self) -> dict[str, Timeline]:
        return {
            name: Timeline(submitted=at, arrivals=tuple(self._arrivals[name])) for name, at in self._submitted.items()
        }
