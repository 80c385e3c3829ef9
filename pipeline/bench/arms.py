"""Plain decoding against DFLASH: the same requests through both engines, in turn, timed the same way."""

import dataclasses
import statistics
from collections.abc import Callable, Sequence

from pipeline.dflash import acceptance
from pipeline.dflash.acceptance import Acceptance
from pipeline.serve.engine import Engine, Finished
from pipeline.serve.scheduler import Request

PLAIN, DFLASH = "plain", "dflash"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pass:
    """One arm's way through all requests. Decode tokens and seconds leave prefill and first tokens out."""

    answers: dict[str, Finished]
    decode_tokens: int
    decode_seconds: float
    prefill_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Decode speed."""
        return self.decode_tokens / self.decode_seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """All passes of both arms, in the order in which they alternated, and the draft's acceptance."""

    plain: tuple[Pass, ...]
    dflash: tuple[Pass, ...]
    acceptance: Acceptance

    @property
    def speedups(self) -> list[float]:
        """One ratio per pair of neighbouring passes, so that a drifting machine cancels out."""
        pairs = zip(self.dflash, self.plain, strict=True)
        return [acceptance.speedup(fast.tokens_per_second, slow.tokens_per_second) for fast, slow in pairs]

    @property
    def speedup(self) -> float:
        """The median ratio."""
        return statistics.median(self.speedups)


def run_pass(engine: Engine, requests: Sequence[Request]) -> Pass:
    """Send all requests through a warm engine and read its clocks."""
    before = engine.clock
    answers = {answer.request_id: answer for answer in engine.generate(requests)}
    after = engine.clock
    return Pass(
        answers=answers,
        decode_tokens=after.decode_tokens - before.decode_tokens,
        decode_seconds=after.decode_seconds - before.decode_seconds,
        prefill_seconds=after.prefill_seconds - before.prefill_seconds,
    )


def compare(
    plain: Engine, dflash: Engine, requests: Sequence[Request], repeats: int, told: Callable[[str, Pass], None]
) -> Comparison:
    """Warm both engines up, then alternate them `repeats` times over the same requests.

    `told` hears of every finished pass. The arm that goes first changes with every repeat. Acceptance is
    the rounds of one pass: greedy decoding repeats itself.
    """
    engines = {PLAIN: plain, DFLASH: dflash}
    for engine in engines.values():
        engine.warm_up()
    passes: dict[str, list[Pass]] = {PLAIN: [], DFLASH: []}
    for repeat in range(repeats):
        for name in (PLAIN, DFLASH) if repeat % 2 == 0 else (DFLASH, PLAIN):
            passes[name].append(run_pass(engines[name], requests))
            told(name, passes[name][-1])
    rounds = [kept for answer in passes[DFLASH][0].answers.values() for kept in answer.kept]
    return Comparison(
        plain=tuple(passes[PLAIN]),
        dflash=tuple(passes[DFLASH]),
        acceptance=Acceptance.of(rounds, dflash.block_size) if rounds else acceptance.empty(dflash.block_size),
    )
