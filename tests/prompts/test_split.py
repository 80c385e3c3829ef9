import random

import pytest

from pipeline.errors import PipelineError
from pipeline.prompts.messages import Message
from pipeline.prompts.sources import generated, prompt_of
from pipeline.prompts.split import is_heldout, split_by_hash

PROMPTS = list(generated(0, 2_000, "low").prompts)


def test_every_prompt_is_on_one_side_and_the_order_is_kept():
    train, heldout = split_by_hash(PROMPTS, 0.1)
    assert sorted(train + heldout, key=PROMPTS.index) == PROMPTS
    assert train == [prompt for prompt in PROMPTS if prompt in set(train)]
    assert 0.07 < len(heldout) / len(PROMPTS) < 0.13


def test_membership_depends_on_the_messages_alone():
    _, heldout = split_by_hash(PROMPTS, 0.1)
    others = [prompt_of(prompt.messages, "high") for prompt in PROMPTS] + [prompt_of([Message("user", "new")], "low")]
    random.Random(1).shuffle(others)
    _, found = split_by_hash(others[: len(others) // 2], 0.1)
    expected = {prompt.prompt_id for prompt in heldout} & {prompt.prompt_id for prompt in others[: len(others) // 2]}
    assert {prompt.prompt_id for prompt in found} - {prompt_of([Message("user", "new")], "low").prompt_id} == expected


def test_a_larger_fraction_holds_out_a_superset():
    small, large = ({prompt.prompt_id for prompt in split_by_hash(PROMPTS, f)[1]} for f in (0.05, 0.2))
    assert small < large


@pytest.mark.parametrize(
    ("digits", "held"),
    [("0" * 16, True), ("7" + "f" * 15, True), ("8" + "0" * 15, False), ("f" * 16, False)],
    ids=["smallest", "just below", "at the fraction", "largest"],
)
def test_the_first_eight_bytes_of_the_id_decide(digits, held):
    assert is_heldout(digits + "0" * 48, 0.5) is held


@pytest.mark.parametrize(
    ("prompts", "fraction", "message"),
    [
        (PROMPTS, 0.0, "heldout_fraction is 0.0; it must be between 0 and 1"),
        (PROMPTS, 1.0, "heldout_fraction is 1.0; it must be between 0 and 1"),
        (
            PROMPTS[:1],
            0.5,
            "1 prompts with heldout_fraction 0.5 give . for training and . held out; .* give more",
        ),
        ([], 0.5, "0 prompts .* give 0 for training and 0 held out"),
    ],
    ids=["nothing held out", "all held out", "one prompt", "none"],
)
def test_a_split_with_an_empty_side_is_refused(prompts, fraction, message):
    with pytest.raises(PipelineError, match=message):
        split_by_hash(prompts, fraction)
