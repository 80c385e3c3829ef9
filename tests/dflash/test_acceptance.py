"""The acceptance rule and its metrics, against counting by hand and by a loop."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from pipeline.dflash import acceptance
from pipeline.dflash.acceptance import Acceptance

ACCEPTED = {
    "all": ([4, 5, 6], [4, 5, 6], 3),
    "none": ([4, 5, 6], [5, 5, 6], 0),  # what agrees behind the first difference is worth nothing
    "two": ([4, 5, 6], [4, 5, 7], 2),
    "one, then agreement again": ([4, 5, 6], [4, 0, 6], 1),
}


@pytest.mark.parametrize(("drafted", "chosen", "accepted"), ACCEPTED.values(), ids=ACCEPTED.keys())
def test_the_agreeing_prefix_is_accepted(drafted, chosen, accepted):
    assert acceptance.count_accepted(jnp.array(drafted), jnp.array(chosen)) == accepted


def test_acceptance_counts_along_the_last_axis_whatever_stands_before_it():
    random = np.random.default_rng(0)
    drafted, chosen = random.integers(0, 2, (2, 5, 7, 4))
    found = np.asarray(acceptance.count_accepted(jnp.asarray(drafted), jnp.asarray(chosen)))
    for index in np.ndindex(5, 7):
        pairs = zip(drafted[index], chosen[index], strict=True)
        wanted = next((count for count, (a, b) in enumerate(pairs) if a != b), 4)
        assert found[index] == wanted


STOPS = {
    "no stop token": ([1, 2, 3, 4], 4, 4, False),
    "in front": ([9, 2, 3, 4], 4, 1, True),
    "inside": ([1, 2, 8, 4], 4, 3, True),
    "the last that counts": ([1, 2, 8, 4], 3, 3, True),
    "behind what counts": ([1, 2, 8, 9], 2, 2, False),
    "two of them": ([1, 8, 9, 4], 4, 2, True),
    "nothing counts": ([9, 9, 9, 9], 0, 0, False),
}


@pytest.mark.parametrize(("tokens", "count", "wanted", "stopped"), STOPS.values(), ids=STOPS.keys())
def test_a_round_ends_at_its_first_stop_token(tokens, count, wanted, stopped):
    found = acceptance.cut_at_stop(jnp.array([tokens]), jnp.array([count]), jnp.array([[8, 9]]))
    assert (int(found[0][0]), bool(found[1][0])) == (wanted, stopped)


def test_rows_are_cut_each_by_itself_and_without_stop_tokens_not_at_all():
    tokens, counts = jnp.array([case[0] for case in STOPS.values()]), jnp.array([case[1] for case in STOPS.values()])
    found, stopped = acceptance.cut_at_stop(tokens, counts, jnp.tile(jnp.array([8, 9]), (len(tokens), 1)))
    assert found.tolist() == [case[2] for case in STOPS.values()]
    assert stopped.tolist() == [case[3] for case in STOPS.values()]
    found, stopped = acceptance.cut_at_stop(tokens, counts, jnp.zeros((len(tokens), 0), jnp.int32))
    assert found.tolist() == counts.tolist()
    assert not stopped.any()


def decoded(accepted_at, prompt_tokens, num_tokens):
    """Accepted tokens per round of a decoder that writes token by token, and how often it wrote each position."""
    written = np.zeros(num_tokens, int)
    written[:prompt_tokens] = 1
    written[prompt_tokens] += 1  # prefill's token
    rounds, last = [], prompt_tokens
    while last + 1 < num_tokens:
        anchor, new = last, 0
        while new < accepted_at[anchor] + 1 and last + 1 < num_tokens:
            last, new = last + 1, new + 1
            written[last] += 1
        rounds.append(new - 1)
    return rounds, written


def test_walking_a_text_runs_a_decoders_rounds_and_writes_every_token_once():
    random = np.random.default_rng(0)
    for _ in range(300):
        num_tokens = int(random.integers(2, 30))
        first_anchor = int(random.integers(1, num_tokens))
        accepted_at = random.integers(0, random.integers(1, 8), num_tokens)
        rounds = acceptance.rounds_over_text(accepted_at, first_anchor, num_tokens)
        wanted, written = decoded(accepted_at, first_anchor, num_tokens)
        assert rounds == wanted
        assert (written == 1).all()
        assert sum(count + 1 for count in rounds) == num_tokens - first_anchor - 1


def test_metrics_are_those_counted_by_hand():
    found = Acceptance.of([0, 3, 1, 3, 0, 2], block_size=4)
    assert found.histogram == (2, 1, 1, 2)
    assert (found.block_size, found.num_rounds, found.num_accepted) == (4, 6, 9)
    assert found.metrics() == {
        "accept_length": 1 + 9 / 6,
        "accept_rate": 9 / 18,
        "accept_rate_at_1": 4 / 6,
        "accept_rate_at_2": 3 / 6,
        "accept_rate_at_3": 2 / 6,
    }


EXTREMES = {"nothing is accepted": ([0, 0], 1.0, 0.0), "everything is accepted": ([4, 4, 4], 5.0, 1.0)}


@pytest.mark.parametrize(("accepted", "length", "rate"), EXTREMES.values(), ids=EXTREMES.keys())
def test_accept_length_goes_from_one_to_the_block_size(accepted, length, rate):
    found = Acceptance.of(accepted, 5)
    assert (found.accept_length, found.accept_rate) == (length, rate)
    assert found.accept_rate_at_k == (rate,) * 4


def test_the_three_metrics_are_one_count():
    random = np.random.default_rng(1)
    for block_size in (2, 5, 16):
        found = Acceptance.of(random.integers(0, block_size, 57).tolist(), block_size)
        assert found.accept_length == pytest.approx(1 + found.accept_rate * (block_size - 1))
        assert np.mean(found.accept_rate_at_k) == pytest.approx(found.accept_rate)
        assert list(found.accept_rate_at_k) == sorted(found.accept_rate_at_k, reverse=True)


def test_counts_add_up():
    first, second = Acceptance.of([0, 2], 3), Acceptance.of([1, 1, 2], 3)
    assert first + second == Acceptance.of([0, 2, 1, 1, 2], 3)
    assert first + acceptance.empty(3) == first


def test_counts_of_other_block_sizes_do_not_add_up():
    with pytest.raises(ValueError, match="shorter"):
        Acceptance.of([0], 4) + Acceptance.of([0], 3)


def test_no_rounds_have_no_metrics():
    assert Acceptance.of([], 4) == acceptance.empty(4)
    assert all(math.isnan(value) for value in acceptance.empty(4).metrics().values())
    assert len(acceptance.empty(4).metrics()) == 5


def test_more_accepted_than_drafted_is_refused():
    with pytest.raises(ValueError, match="5 tokens accepted in a block of 5, which drafts 4"):
        Acceptance.of([1, 5], 5)


def test_speedup_is_dflash_over_plain():
    assert acceptance.speedup(300.0, 120.0) == 2.5
    assert math.isnan(acceptance.speedup(0.0, 0.0))  # every answer was one token
