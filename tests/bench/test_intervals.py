"""Intervals hold what they say: of made-up machines and prompts, 95 of 100 contain the speedup that is true."""

import numpy as np
import pytest

from pipeline.bench import intervals
from pipeline.bench.intervals import Interval, PassTimes
from pipeline.dflash.acceptance import Acceptance

TRUE_SPEEDUP = 1.5


def measured(random, num_passes, num_prompts, noise):
    """Both arms' times: prompts differ in what the draft gains on them, and every pass in how fast the machine is."""
    tokens = np.broadcast_to(random.integers(20, 120, num_prompts).astype(float), (num_passes, num_prompts))
    gains = random.normal(TRUE_SPEEDUP, 0.3, num_prompts)
    plain = tokens * 1e-3 * np.exp(random.normal(0, noise, (num_passes, 1)))
    dflash = tokens * 1e-3 / gains * np.exp(random.normal(0, noise, (num_passes, 1)))
    return PassTimes(tokens=tokens, seconds=plain), PassTimes(tokens=tokens, seconds=dflash)


def test_an_interval_holds_the_true_speedup_about_as_often_as_it_says():
    random, held = np.random.default_rng(0), 0
    for seed in range(200):
        found = intervals.speedup_interval(*measured(random, 12, 60, 0.03), seed=seed)
        held += found.low <= TRUE_SPEEDUP * 0.96 <= found.high  # a mean of speeds is above the speed of all tokens
    assert 0.88 * 200 <= held <= 200


def test_more_prompts_and_calmer_machines_make_it_narrower():
    def width(*, num_passes=8, num_prompts=50, noise=0.02):
        found = intervals.speedup_interval(*measured(np.random.default_rng(3), num_passes, num_prompts, noise))
        return found.high - found.low

    assert width(num_prompts=800) < width() / 2
    assert width(noise=0.2) > 2 * width()


def test_what_prompts_alone_add_is_less_than_the_whole():
    both = measured(np.random.default_rng(5), 4, 40, 0.3)
    whole, alone = intervals.speedup_interval(*both), intervals.speedup_interval(*both, passes_vary=False)
    assert alone.high - alone.low < (whole.high - whole.low) / 2


def test_equal_passes_of_equal_prompts_leave_no_doubt():
    plain = PassTimes(tokens=np.full((3, 5), 10.0), seconds=np.full((3, 5), 2.0))
    dflash = PassTimes(tokens=np.full((3, 5), 10.0), seconds=np.full((3, 5), 1.0))
    assert intervals.speedup_of(plain, dflash) == 2.0
    assert intervals.speedup_interval(plain, dflash) == Interval(2.0, 2.0)


def test_the_interval_of_accept_length_is_a_bootstrap_over_answers():
    random = np.random.default_rng(1)
    num_rounds = random.integers(5, 30, 40)
    accepted = (num_rounds * random.uniform(2, 4, 40)).astype(int)
    found = intervals.accept_length_interval(accepted, num_rounds)
    drawn = random.integers(0, 40, (4000, 40))
    lengths = 1 + accepted[drawn].sum(1) / num_rounds[drawn].sum(1)
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(lengths, (2.5, 97.5))), abs=0.03)


def test_every_position_has_an_interval_around_its_rate():
    rounds = [[3, 0, 1], [2, 2], [0, 3, 3, 1]]
    counts = np.array([[sum(one >= k for one in some) for k in (1, 2, 3)] for some in rounds])
    found = intervals.share_intervals(counts, np.array([len(some) for some in rounds]))
    rates = Acceptance.of([one for some in rounds for one in some], 4).accept_rate_at_k
    assert all(one.low <= rate <= one.high for one, rate in zip(found, rates, strict=True))


def test_an_interval_knows_its_width():
    assert Interval(0.9, 1.1).relative_half_width(1.0) == pytest.approx(0.1)
