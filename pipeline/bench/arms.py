"""Compares plain decoding with DFLASH: the same requests go through both engines in turn, timed the same way."""

import dataclasses
import statistics
from collections.abc import Callable, Sequence

from pipeline.dflash import acceptance
from pipeline.dflash.acceptance import Acceptance
from pipeline.engine.engine import Engine
from pipeline.engine.request import Completion, Request

PLAIN, DFLASH = "plain", "dflash"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmPass:
    """Holds one arm's pass over all requests. Decode tokens and seconds leave prefill and first tokens out."""

    answers: dict[str, Completion]
    decode_tokens: int
    decode_seconds: float
    prefill_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Returns the decode speed."""
        return self.decode_tokens / self.decode_seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Holds all passes of both arms, in the order in which they alternated, and the draft's acceptance."""

    plain: tuple[ArmPass, ...]
    dflash: tuple[ArmPass, ...]
    acceptance: Acceptance

    @property
    def speedups(self) -> list[float]:
        """Returns one ratio for each pair of neighbouring passes, so that a drift in the machine's speed cancels."""
        pairs = zip(self.dflash, self.plain, strict=True)
        return [acceptance.speedup(fast.tokens_per_second, slow.tokens_per_second) for fast, slow in pairs]

    @property
    def speedup(self) -> float:
        """Returns the median ratio."""
        return statistics.median(self.speedups)


def run_pass(engine: Engine, requests: Sequence[Request]) -> ArmPass:
    """Sends all requests through a warm engine and reads its times."""
    before = engine.times
    answers = {answer.request_id: answer for answer in engine.generate(requests)}
    after = engine.times
    return ArmPass(
        answers=answers,
        decode_tokens=after.decode_tokens - before.decode_tokens,
        decode_seconds=after.decode_seconds - before.decode_seconds,
        prefill_seconds=after.prefill_seconds - before.prefill_seconds,
    )


def compare_arms(
    plain: Engine, dflash: Engine, requests: Sequence[Request], repeats: int, on_pass: Callable[[str, ArmPass], None]
) -> Comparison:
    """Warms both engines up, then alternates them `repeats` times over the same requests.

    `on_pass` is called with every finished pass. The arm that goes first changes with every repeat. Acceptance is
    that of the rounds of one pass: greedy decoding repeats itself.
    """
    engines = {PLAIN: plain, DFLASH: dflash}
    for engine in engines.values():
        engine.warm_up()
    passes: dict[str, list[ArmPass]] = {PLAIN: [], DFLASH: []}
    for repeat in range(repeats):
        for name in (PLAIN, DFLASH) if repeat % 2 == 0 else (DFLASH, PLAIN):
            passes[name].append(run_pass(engines[name], requests))
            on_pass(name, passes[name][-1])
    rounds = [count for answer in passes[DFLASH][0].answers.values() for count in answer.accepted_per_round]
    block_size = dflash.block_size or 1
    return Comparison(
        plain=tuple(passes[PLAIN]),
        dflash=tuple(passes[DFLASH]),
        acceptance=Acceptance.of(rounds, block_size) if rounds else acceptance.empty(block_size),
    )
