"""When a draft may become the champion, and every reason why it may not."""

import pytest

from pipeline.promote import judgement

GOOD = {
    "speedup": 1.5,
    "speedup_low": 1.4,
    "speedup_high": 1.6,
    "wrong_answers": 0,
    "engine_over_training": 0.99,
    "target_fingerprint": "t",
    "prompts_fingerprint": "p",
    "machine": {"device": "cpu"},
    "precision": "float32",
    "temperature": 0.0,
    "slots": 1,
}
BETTER = GOOD | {"speedup": 1.8, "speedup_low": 1.7, "speedup_high": 1.9}


def test_a_draft_that_is_better_beyond_both_intervals_may():
    assert judgement.reasons_against(BETTER, GOOD, 0.02) == []
    assert judgement.reasons_against(GOOD, None, 0.02) == []


@pytest.mark.parametrize(
    ("changes", "champion", "reason"),
    [
        ({"wrong_answers": 2}, GOOD, "changes 2 answers"),
        ({"engine_over_training": 0.9}, GOOD, "accepts 90.0% of what training measured"),
        ({"engine_over_training": None}, GOOD, "does not say what training measured"),
        ({"speedup_low": 1.59}, GOOD, r"not faster than the champion beyond the intervals: 1.800x (1.590 to 1.900)"),
        ({"machine": {"device": "TPU"}}, GOOD, "measured with another machine"),
        ({"prompts_fingerprint": "q", "slots": 8}, GOOD, "another prompts_fingerprint, slots"),
        ({"speedup_low": 0.99}, None, "not faster than plain decoding"),
    ],
)
def test_each_reason_against_it_is_said(changes, champion, reason):
    candidate = {name: value for name, value in (BETTER | changes).items() if value is not None}
    (found,) = judgement.reasons_against(candidate, champion, 0.02)
    assert reason in found


def test_all_reasons_are_said_at_once():
    bad = BETTER | {"wrong_answers": 1, "engine_over_training": 0.5, "speedup_low": 1.0}
    assert len(judgement.reasons_against(bad, GOOD, 0.02)) == 3


def test_a_version_carries_what_judging_it_later_needs():
    record = judgement.carried(GOOD | {"by": {"family": {}}, "warnings": ["x"]})
    assert record == GOOD
    assert judgement.reasons_against(BETTER, record, 0.02) == []
