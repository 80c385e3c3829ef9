"""What is made of the times at which tokens came."""

import math

import numpy as np
import pytest

from pipeline.bench import timeline
from pipeline.bench.load import poisson_arrivals
from pipeline.bench.timeline import Timeline

SLOW = Timeline(submitted=10.0, arrivals=((11.0, 1), (13.0, 2), (16.0, 2)))
FAST = Timeline(submitted=10.0, arrivals=((10.5, 1), (12.5, 4)))
ALONE = Timeline(submitted=20.0, arrivals=((20.25, 1),))


def test_an_answers_times_run_from_its_own_request():
    assert (SLOW.num_tokens, SLOW.first_seconds, SLOW.decode_seconds) == (5, 1.0, 5.0)
    assert SLOW.gaps == [2.0, 3.0]
    assert (ALONE.num_tokens, ALONE.decode_seconds, ALONE.gaps) == (1, 0.0, [])


def test_seconds_are_shared_as_the_answers_were_decoding():
    shares = timeline.shares_of([SLOW, FAST, ALONE], 3.5)
    assert shares.tolist() == pytest.approx([2.5, 1.0, 0.0])
    assert timeline.shares_of([ALONE, ALONE], 1.0).tolist() == [0.5, 0.5]


def test_latencies_are_percentiles_in_milliseconds():
    found = timeline.latencies([SLOW, FAST, ALONE])
    assert found["ttft_p50_ms"] == 500.0
    assert found["tpot_p50_ms"] == pytest.approx(np.median([5 / 4, 2 / 4]) * 1e3)  # of one token there is no such time
    assert found["itl_p99_ms"] == pytest.approx(np.percentile([2, 3, 2], 99) * 1e3)
    assert timeline.latencies([ALONE]).keys() == {"ttft_p50_ms", "ttft_p90_ms", "ttft_p99_ms"}


def test_goodput_counts_requests_that_met_both_objectives():
    def of(ttft, tpot):
        return timeline.goodput([SLOW, FAST, ALONE], 2.0, ttft_seconds=ttft, tpot_seconds=tpot)

    assert of(1.0, 1.25) == 1.5
    assert of(0.9, 1.25) == 1.0
    assert of(1.0, 0.5) == 1.0
    assert of(0.1, 9.0) == 0.0


def test_the_steady_speed_is_that_while_every_slot_decodes():
    """Two answers beside each other from 11 to 12.5: two tokens of FAST's four came at 12.5, none of SLOW's."""
    assert timeline.steady_tokens_per_second([SLOW, FAST], 2) == pytest.approx(4 / 1.5)
    assert timeline.steady_tokens_per_second([SLOW], 1) == pytest.approx(4 / 5)
    assert math.isnan(timeline.steady_tokens_per_second([SLOW, ALONE], 2))


def test_requests_arrive_at_random_at_the_rate_that_was_asked_for():
    found = poisson_arrivals(4000, 20.0, seed=1)
    gaps = np.diff([0.0, *found])
    assert found == poisson_arrivals(4000, 20.0, seed=1) != poisson_arrivals(4000, 20.0, seed=2)
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.05)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)  # as of an exponential distribution
