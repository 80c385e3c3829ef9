"""How the two arms alternate and what is made of their times, with engines whose times a test sets."""

import dataclasses
import math

from pipeline.bench import arms
from pipeline.bench.arms import DFLASH, PLAIN, ArmPass, Comparison
from pipeline.dflash import acceptance
from pipeline.dflash.acceptance import Acceptance
from pipeline.engine.engine import Engine
from pipeline.engine.in_flight import EngineTimes
from pipeline.engine.request import Completion, Request

REQUESTS = [Request(request_id=name, prompt_ids=(1, 2, 3), max_new_tokens=5) for name in "abc"]
ACCEPTED = {"a": (3, 0), "b": (1,), "c": (0, 0, 2)}


class ScriptedEngine(Engine):
    """Answers every request with five tokens; its n-th pass decodes in the n-th of `seconds`."""

    def __init__(self, name, seconds, history, block_size):
        self.name, self.seconds, self.history, self.block_size = name, iter(seconds), history, block_size
        self.times = EngineTimes(
            decode_tokens=1000, decode_seconds=1000.0, prefill_seconds=1000.0
        )  # of an earlier life

    def warm_up(self):
        self.history.append(f"warm {self.name}")

    def generate(self, requests):
        self.history.append(self.name)
        for request in requests:
            accepted = ACCEPTED[request.request_id] if self.block_size else ()
            yield Completion(
                request_id=request.request_id, token_ids=(7,) * 5, finish_reason="length", accepted_per_round=accepted
            )
        times = self.times
        self.times = dataclasses.replace(
            times,
            decode_tokens=times.decode_tokens + 12,
            decode_seconds=times.decode_seconds + next(self.seconds),
            prefill_seconds=times.prefill_seconds + 0.5,
        )


def compared(plain_seconds, dflash_seconds):
    history, reported = [], []
    comparison = arms.compare_arms(
        ScriptedEngine(PLAIN, plain_seconds, history, None),
        ScriptedEngine(DFLASH, dflash_seconds, history, 4),
        REQUESTS,
        len(plain_seconds),
        lambda name, one: reported.append((name, one)),
    )
    return comparison, history, reported


def test_both_are_warm_before_the_first_pass_and_take_turns_in_going_first():
    comparison, history, reported = compared([1.0] * 3, [1.0] * 3)
    warm = ["warm plain", "warm dflash"]
    assert history == [*warm, PLAIN, DFLASH, DFLASH, PLAIN, PLAIN, DFLASH]
    assert [name for name, _ in reported] == history[2:]
    assert [one for name, one in reported if name == DFLASH] == list(comparison.dflash)


def test_a_pass_reads_what_its_engines_times_gained():
    comparison, _, _ = compared([3.0, 4.0], [1.5, 0.5])
    assert [one.decode_seconds for one in comparison.plain] == [3.0, 4.0]
    assert [one.decode_tokens for one in comparison.plain + comparison.dflash] == [12] * 4
    assert [one.tokens_per_second for one in comparison.dflash] == [8.0, 24.0]
    assert {one.prefill_seconds for one in comparison.plain} == {0.5}
    assert comparison.plain[0].answers["b"].token_ids == (7,) * 5


def test_the_speedup_is_the_median_over_pairs_of_neighbours():
    comparison, _, _ = compared([4.0, 8.0, 2.0], [2.0, 1.0, 2.0])
    assert comparison.speedups == [2.0, 8.0, 1.0]
    assert comparison.speedup == 2.0


def test_acceptance_counts_the_rounds_of_one_pass_only():
    comparison, _, _ = compared([1.0] * 3, [1.0] * 3)
    assert comparison.acceptance == Acceptance.of([3, 0, 1, 0, 0, 2], 4)


def test_answers_of_one_token_have_neither_rounds_nor_a_speedup():
    one = ArmPass(answers={}, decode_tokens=0, decode_seconds=1.0, prefill_seconds=1.0)
    comparison = Comparison(plain=(one,), dflash=(one,), acceptance=acceptance.empty(4))
    assert math.isnan(comparison.speedup)
