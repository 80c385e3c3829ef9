"""Compares ways to decode: the same requests go through every arm in turn, timed the same way."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from pipeline.bench.intervals import PassTimes
from pipeline.bench.timeline import Timeline, shares_of
from pipeline.dflash.acceptance import Acceptance
from pipeline.engine.request import Completion, Request

PLAIN, DFLASH = "plain", "dflash"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmPass:
    """Holds one arm's pass over all requests. Decode tokens and seconds leave prefill and first tokens out.

    `seconds` is the whole pass.
    """

    answers: dict[str, Completion]
    timelines: dict[str, Timeline]
    decode_tokens: int
    decode_seconds: float
    prefill_seconds: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Returns the decode speed."""
        return self.decode_tokens / self.decode_seconds

    @property
    def end_to_end_tokens_per_second(self) -> float:
        """Returns all tokens over the whole pass, prompts and first tokens included."""
        return sum(len(one.token_ids) for one in self.answers.values()) / self.seconds


@runtime_checkable
class Arm(Protocol):
    """Describes what is compared: an engine of this process, or a running server."""

    block_size: int | None

    def warm_up(self, on_compiled: Callable[[str], None] = ...) -> None:
        """Compiles what requests will run."""

    def run(self, requests: Sequence[Request], arrivals: Sequence[float] | None = None) -> ArmPass:
        """Runs requests, each as soon as a slot is free, or `arrivals` seconds after the beginning."""

    def acceptance(self, passes: Sequence[ArmPass]) -> Acceptance:
        """Returns what the rounds of these passes accepted, which are all passes since the warm-up."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Holds the passes of every arm, in the order in which they alternated, and the draft's acceptance."""

    passes: Mapping[str, tuple[ArmPass, ...]]
    acceptance: Acceptance

    @property
    def plain(self) -> tuple[ArmPass, ...]:
        """The passes of plain decoding."""
        return self.passes[PLAIN]

    @property
    def dflash(self) -> tuple[ArmPass, ...]:
        """The passes with the draft."""
        return self.passes[DFLASH]

    def times(self, arm: str, request_ids: Sequence[str]) -> PassTimes:
        """Returns what each of these requests gave and took in each pass of an arm."""
        tokens, seconds = [], []
        for one in self.passes[arm]:
            everything = list(one.timelines)
            shares = dict(zip(everything, shares_of(list(one.timelines.values()), one.decode_seconds), strict=True))
            seconds.append([shares[name] for name in request_ids])
            tokens.append([float(len(one.answers[name].token_ids) - 1) for name in request_ids])
        return PassTimes(tokens=np.array(tokens), seconds=np.array(seconds))


def compare_arms(
    arms: Mapping[str, Arm],
    requests: Sequence[Request],
    repeats: int,
    *,
    on_pass: Callable[[str, ArmPass], None] = lambda name, one: None,
    wants_more: Callable[[Comparison], bool] = lambda found: False,
) -> Comparison:
    """Warms all arms up, then alternates them `repeats` times over the same requests, and longer if more is wanted.

    `on_pass` is called with every finished pass. The order is turned round with every repeat (A B B A). Acceptance is
    that of the arm DFLASH.
    """
    for arm in arms.values():
        arm.warm_up()
    passes: dict[str, list[ArmPass]] = {name: [] for name in arms}
    number = 0
    while True:
        for name in list(arms) if number % 2 == 0 else list(arms)[::-1]:
            passes[name].append(arms[name].run(requests))
            on_pass(name, passes[name][-1])
        number += 1
        if number >= repeats:
            found = Comparison(
                passes={name: tuple(some) for name, some in passes.items()},
                acceptance=arms[DFLASH].acceptance(passes[DFLASH]),
            )
            if not wants_more(found):
                return found
