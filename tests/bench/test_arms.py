"""How the two arms alternate and what is made of their times, with arms whose times a test sets."""

import pytest

from pipeline.bench import arms, intervals
from pipeline.bench.arms import DFLASH, PLAIN, ArmPass
from pipeline.bench.timeline import Timeline
from pipeline.dflash.acceptance import Acceptance
from pipeline.engine.request import Completion, Request

REQUESTS = [Request(request_id=f"prompt-{index}", prompt_ids=(1, 2, 3), max_new_tokens=5) for index in range(3)]
ACCEPTED = {"prompt-0": (3, 0), "prompt-1": (1,), "prompt-2": (0, 0, 2)}


class ScriptedArm:
    """Answers every request with five tokens; its n-th pass decodes in the n-th of `seconds`, answer by answer."""

    def __init__(self, name, seconds, history, block_size):
        self.name, self.seconds, self.history, self.block_size = name, iter(seconds), history, block_size

    def warm_up(self, on_compiled=lambda name: None):
        self.history.append(f"warm {self.name}")

    def run(self, requests, arrivals=None):
        self.history.append(self.name)
        seconds = next(self.seconds)
        answers = {
            one.request_id: Completion(
                request_id=one.request_id,
                token_ids=(7,) * 5,
                finish_reason="length",
                accepted_per_round=ACCEPTED[one.request_id] if self.block_size else (),
            )
            for one in requests
        }
        each = seconds / len(requests)
        timelines = {name: Timeline(submitted=0.0, arrivals=((0.1, 1), (0.1 + each, 4))) for name in answers}
        return ArmPass(
            answers=answers,
            timelines=timelines,
            decode_tokens=4 * len(requests),
            decode_seconds=seconds,
            prefill_seconds=0.5,
            seconds=seconds + 0.5,
        )

    def acceptance(self, passes):
        return Acceptance.of([one for some in ACCEPTED.values() for one in some], 4)


def compared(plain_seconds, dflash_seconds, **options):
    history, reported = [], []
    both = {
        PLAIN: ScriptedArm(PLAIN, plain_seconds, history, None),
        DFLASH: ScriptedArm(DFLASH, dflash_seconds, history, 4),
    }
    comparison = arms.compare_arms(
        both, REQUESTS, options.pop("repeats", len(plain_seconds)), on_pass=lambda *one: reported.append(one), **options
    )
    return comparison, history, reported


def speedup_of(comparison):
    names = [one.request_id for one in REQUESTS]
    return intervals.speedup_of(comparison.times(PLAIN, names), comparison.times(DFLASH, names))


def test_both_are_warm_before_the_first_pass_and_take_turns_in_going_first():
    comparison, history, reported = compared([1.0] * 3, [1.0] * 3)
    warm = ["warm plain", "warm dflash"]
    assert history == [*warm, PLAIN, DFLASH, DFLASH, PLAIN, PLAIN, DFLASH]
    assert [name for name, _ in reported] == history[2:]
    assert [one for name, one in reported if name == DFLASH] == list(comparison.dflash)


def test_the_speedup_is_the_median_over_pairs_of_neighbours():
    comparison, _, _ = compared([4.0, 8.0, 2.0], [2.0, 1.0, 2.0])
    assert speedup_of(comparison) == pytest.approx(2.0)
    times = comparison.times(DFLASH, [one.request_id for one in REQUESTS])
    assert times.speeds.tolist() == pytest.approx([6.0, 12.0, 6.0])


def test_speeds_of_some_requests_leave_the_others_out():
    comparison, _, _ = compared([3.0], [1.5])
    some = comparison.times(PLAIN, ["prompt-1"])
    assert some.tokens.tolist() == [[4.0]]
    assert some.seconds[0].tolist() == pytest.approx([1.0])


def test_it_goes_on_for_as_long_as_more_is_wanted():
    counts = []

    def wants_more(found):
        counts.append(len(found.plain))
        return len(found.plain) < 5

    comparison, _, _ = compared([1.0] * 9, [1.0] * 9, repeats=3, wants_more=wants_more)
    assert counts == [3, 4, 5]
    assert len(comparison.dflash) == 5


def test_acceptance_is_the_arms_own():
    comparison, _, _ = compared([1.0] * 3, [1.0] * 3)
    assert comparison.acceptance == Acceptance.of([3, 0, 1, 0, 0, 2], 4)


def test_a_pass_has_speeds_of_decoding_and_of_everything():
    comparison, _, _ = compared([1.5], [1.5])
    (one,) = comparison.plain
    assert (one.tokens_per_second, one.end_to_end_tokens_per_second) == (8.0, 7.5)
