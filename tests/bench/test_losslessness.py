"""Equal answers, answers that part at a tie, and answers that part for no good reason."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from pipeline.bench import losslessness
from pipeline.model import gpt_oss, gpt_oss_weights
from pipeline.model.gpt_oss_config import GptOssConfig
from pipeline.serve.engine import Finished
from pipeline.serve.scheduler import Request

CONFIG = GptOssConfig.from_hf(tiny_models.LEGACY_TARGET)
PROMPT = (3, 14, 15, 9)
GIVEN = (26, 53)  # generated before the arms part
forward = jax.jit(gpt_oss.forward, static_argnames="config")


@pytest.fixture(scope="module")
def weights():
    return jax.jit(gpt_oss_weights.random_weights, static_argnums=0)(CONFIG, jax.random.key(0))


def logits_after(weights, token_ids):
    """The target's logits for the token that follows, without padding."""
    row = jnp.array([token_ids], jnp.int32)
    hidden = forward(weights, CONFIG, row, jnp.zeros(1, jnp.int32), None).hidden
    return np.asarray(gpt_oss.logits(weights, hidden[0, -1]))


def finished(name, *token_ids):
    return Finished(request_id=name, token_ids=token_ids, finish_reason="length", kept=())


def compared(weights, plain, dflash):
    """One request answered alike in both arms, and one answered by these tokens."""
    requests = [Request(request_id=name, prompt_ids=PROMPT, max_new_tokens=9) for name in ("same", "other")]
    same = finished("same", 1, 2, 3)
    return losslessness.compare(
        {"same": same, "other": finished("other", *plain)},
        {"same": same, "other": finished("other", *dflash)},
        requests,
        weights,
        CONFIG,
    )


def test_equal_answers_differ_nowhere(weights):
    found = compared(weights, (4, 5), (4, 5))
    assert (found.num_answers, found.num_equal, found.differences, found.bugs) == (2, 2, (), ())


def test_a_difference_where_the_targets_choice_was_clear_is_a_bug_told_with_its_place_and_gap(weights):
    logits = logits_after(weights, [*PROMPT, *GIVEN])
    best, second = np.argsort(logits)[::-1][:2]
    found = compared(weights, (*GIVEN, int(best), 8), (*GIVEN, int(second), 8))
    assert found.num_equal == 1
    assert found.bugs == found.differences
    (bug,) = found.bugs
    assert (bug.request_id, bug.position) == ("other", 2)
    assert (bug.plain_token, bug.dflash_token) == (best, second)
    assert bug.logit_gap == pytest.approx(logits[best] - logits[second], abs=1e-5)
    assert bug.logit_gap > found.tie_gap == 1e-3


def test_a_difference_between_tokens_of_equal_logits_is_a_tie(weights):
    logits = logits_after(weights, [*PROMPT, *GIVEN])
    best, second = (int(token) for token in np.argsort(logits)[::-1][:2])
    tied = dataclasses.replace(weights, head=weights.head.at[:, second].set(weights.head[:, best]))
    found = compared(tied, (*GIVEN, best), (*GIVEN, second))
    assert found.num_equal == 1
    assert found.bugs == ()
    assert found.differences[0].logit_gap < 1e-5


def test_the_gap_is_the_targets_where_the_plain_arm_stood_not_that_of_later_tokens(weights):
    tokens = tuple(range(20, 29))
    found = compared(weights, tokens, (*tokens[:5], 1, *tokens[6:8], 2))  # parts twice; the first place counts
    logits = np.sort(logits_after(weights, [*PROMPT, *tokens[:5]]))
    assert [one.position for one in found.differences] == [5]
    assert found.differences[0].logit_gap == pytest.approx(logits[-1] - logits[-2], abs=1e-5)


LENGTHS = {
    "DFLASH goes on": ((4, 5), (4, 5, 6), (2, None, 6)),
    "DFLASH ends early": ((4, 5, 6), (4, 5), (2, 6, None)),
    "DFLASH says nothing": ((4,), (), (0, 4, None)),
}


@pytest.mark.parametrize(("plain", "dflash", "wanted"), LENGTHS.values(), ids=LENGTHS.keys())
def test_an_answer_of_another_length_is_a_difference_where_the_shorter_one_ends(weights, plain, dflash, wanted):
    (found,) = compared(weights, plain, dflash).differences
    assert (found.position, found.plain_token, found.dflash_token) == wanted


def test_bfloat16_has_a_wider_tie(weights):
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), weights)
    assert compared(rounded, (4,), (5,)).tie_gap == 0.25
