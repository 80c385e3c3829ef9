"""Equal answers, answers that part at a tie, and answers that part for no good reason."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipeline.bench import losslessness
from pipeline.engine.request import Completion, Request
from pipeline.model.gpt_oss import forward as gpt_oss
from pipeline.model.gpt_oss import weights as gpt_oss_weights
from pipeline.model.gpt_oss.config import GptOssConfig
from pipeline.model.gpt_oss.model import TargetModel
from tests.support import models as tiny_models

pytestmark = pytest.mark.usefixtures("compiled_quickly")

CONFIG = GptOssConfig.from_hf(tiny_models.LEGACY_TARGET)
PROMPT = (3, 14, 15, 9)
GIVEN = (26, 53)  # generated before the arms part
forward = jax.jit(gpt_oss.forward)


@pytest.fixture(scope="module")
def target():
    return TargetModel(CONFIG, jax.jit(gpt_oss_weights.random_weights, static_argnums=0)(CONFIG, jax.random.key(0)))


def logits_after(target, token_ids):
    """The target's logits for the token that follows, without padding."""
    row = jnp.array([token_ids], jnp.int32)
    hidden = forward(target, row, jnp.zeros(1, jnp.int32), None).hidden
    return np.asarray(gpt_oss.logits(target.weights, hidden[0, -1]))


def finished(name, *token_ids):
    return Completion(request_id=name, token_ids=token_ids, finish_reason="length", accepted_per_round=())


def compared(target, plain, dflash):
    """One request answered alike in both arms, and one answered by these tokens."""
    requests = [Request(request_id=name, prompt_ids=PROMPT, max_new_tokens=9) for name in ("same", "other")]
    same = finished("same", 1, 2, 3)
    return losslessness.compare_answers(
        {"same": same, "other": finished("other", *plain)},
        {"same": same, "other": finished("other", *dflash)},
        requests,
        target,
    )


def test_equal_answers_differ_nowhere(target):
    found = compared(target, (4, 5), (4, 5))
    assert (found.num_answers, found.num_equal, found.differences, found.bugs) == (2, 2, (), ())


def test_a_difference_where_the_targets_choice_was_clear_is_a_bug_named_with_its_position_and_gap(target):
    logits = logits_after(target, [*PROMPT, *GIVEN])
    best, second = np.argsort(logits)[::-1][:2]
    found = compared(target, (*GIVEN, int(best), 8), (*GIVEN, int(second), 8))
    assert found.num_equal == 1
    assert found.bugs == found.differences
    (bug,) = found.bugs
    assert (bug.request_id, bug.position) == ("other", 2)
    assert (bug.plain_token, bug.dflash_token) == (best, second)
    assert bug.logit_gap == pytest.approx(logits[best] - logits[second], abs=1e-5)
    assert bug.logit_gap > found.tie_gap == 1e-3


def test_a_difference_between_tokens_of_equal_logits_is_a_tie(target):
    logits = logits_after(target, [*PROMPT, *GIVEN])
    best, second = (int(token) for token in np.argsort(logits)[::-1][:2])
    weights = target.weights
    tied = TargetModel(CONFIG, dataclasses.replace(weights, head=weights.head.at[:, second].set(weights.head[:, best])))
    found = compared(tied, (*GIVEN, best), (*GIVEN, second))
    assert found.num_equal == 1
    assert found.bugs == ()
    assert found.differences[0].logit_gap < 1e-5


def test_the_gap_is_the_targets_where_the_plain_arm_stood_not_that_of_later_tokens(target):
    tokens = tuple(range(20, 29))
    found = compared(target, tokens, (*tokens[:5], 1, *tokens[6:8], 2))  # parts twice; the first one counts
    logits = np.sort(logits_after(target, [*PROMPT, *tokens[:5]]))
    assert [one.position for one in found.differences] == [5]
    assert found.differences[0].logit_gap == pytest.approx(logits[-1] - logits[-2], abs=1e-5)


LENGTHS = {
    "DFLASH goes on": ((4, 5), (4, 5, 6), (2, None, 6)),
    "DFLASH ends early": ((4, 5, 6), (4, 5), (2, 6, None)),
    "DFLASH says nothing": ((4,), (), (0, 4, None)),
}


@pytest.mark.parametrize(("plain", "dflash", "wanted"), LENGTHS.values(), ids=LENGTHS.keys())
def test_an_answer_of_another_length_is_a_difference_where_the_shorter_one_ends(target, plain, dflash, wanted):
    (found,) = compared(target, plain, dflash).differences
    assert (found.position, found.plain_token, found.dflash_token) == wanted


def test_bfloat16_has_a_wider_tie(target):
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), target)
    assert compared(rounded, (4,), (5,)).tie_gap == 0.25
