"""The numbers of a benchmark as values and as the table that ends a demo."""

import dataclasses
import json

import pytest

from pipeline.bench import report
from pipeline.bench.arms import ArmPass, Comparison
from pipeline.bench.losslessness import Difference, Losslessness
from pipeline.dflash.acceptance import Acceptance
from pipeline.engine.request import Completion

KEYS = {
    "accept_length",
    "accept_rate",
    "accept_rate_at_1",
    "accept_rate_at_2",
    "accept_rate_at_3",
    "speedup",
    "speedup_min",
    "speedup_max",
    "break_even_accept_length",
    "plain_tokens_per_second",
    "dflash_tokens_per_second",
    "plain_prefill_seconds",
    "dflash_prefill_seconds",
    "num_prompts",
    "num_rounds",
    "decode_tokens",
    "equal_answers",
    "tied_answers",
    "wrong_answers",
}


def one_pass(seconds, prefill_seconds):
    return ArmPass(answers={}, decode_tokens=1200, decode_seconds=seconds, prefill_seconds=prefill_seconds)


COMPARISON = Comparison(
    plain=tuple(one_pass(seconds, 0.25) for seconds in (4.0, 3.0, 2.0)),
    dflash=tuple(one_pass(seconds, 0.5) for seconds in (2.0, 1.0, 1.0)),
    acceptance=Acceptance.of([3, 1, 0, 2, 3, 0], 4),
)


def lossless(*gaps):
    differences = tuple(
        Difference(request_id=f"prompt-{index}", position=4, plain_token=1, dflash_token=2, logit_gap=gap)
        for index, gap in enumerate(gaps)
    )
    return Losslessness(num_answers=9, differences=differences, tie_gap=1e-3)


def measured(*gaps, **evaluation):
    return report.results(COMPARISON, lossless(*gaps), evaluation)


def test_results_hold_every_measure_under_the_names_of_mlflow():
    found = measured(1e-4, 0.7, 0.9)
    assert found.keys() == KEYS
    assert found["accept_length"] == 1 + 9 / 6
    assert found["accept_rate"] == 9 / 18
    assert (found["speedup"], found["speedup_min"], found["speedup_max"]) == (2.0, 2.0, 3.0)
    assert found["break_even_accept_length"] == 1.25  # a draft with that accept_length would have speedup 1
    assert (found["plain_tokens_per_second"], found["dflash_tokens_per_second"]) == (400.0, 1200.0)
    assert (found["plain_prefill_seconds"], found["dflash_prefill_seconds"]) == (0.25, 0.5)
    assert (found["num_prompts"], found["num_rounds"], found["decode_tokens"]) == (9, 6, 1200)
    assert (found["equal_answers"], found["tied_answers"], found["wrong_answers"]) == (6, 1, 2)
    assert json.loads(json.dumps(found)) == found


def test_a_draft_is_compared_with_its_evaluations_in_training_and_at_export():
    found = measured(heldout={"accept_length": 2.0})
    assert found.keys() == KEYS | {"training_accept_length", "engine_over_training"}
    assert found["engine_over_training"] == pytest.approx(1.25)
    found = measured(heldout={"accept_length": 2.0}, engine={"accept_length": 2.4})
    assert found["export_accept_length"] == 2.4


def test_the_table_shows_every_number_a_demo_promises():
    lines = report.results_table(
        measured(heldout={"accept_length": 2.0}, engine={"accept_length": 2.4}), 4
    ).splitlines()
    rows = dict(line.split("  ", 1) for line in lines[1:-1])
    assert lines[0] == lines[-1] == "-" * len(lines[0])
    assert max(map(len, lines[1:-1])) == len(lines[0])
    assert {name.strip(): value.strip() for name, value in rows.items()} == {
        "accept_length": "2.500 of 4",
        "accept_rate": "0.500",
        "accept_rate_at_k": "0.67 0.50 0.33",
        "plain": "400 tokens/s",
        "DFLASH": "1200 tokens/s",
        "speedup": "2.00x (2.00 to 3.00)",
        "break-even": "accept_length 1.25, a round's cost in plain steps",
        "losslessness": "9 of 9 answers equal plain greedy's",
        "in training": "accept_length 2.000 (here 125.0% of it)",
        "at export": "accept_length 2.400",
        "measured on": "9 prompts, 1200 tokens",
    }


def test_families_are_measured_apart_and_shown_from_the_shortest_to_the_longest():
    rounds = {"prompt-1": (3, 3), "prompt-0": (0, 1, 2), "prompt-2": (3,), "prompt-10": (2, 2), "prompt-3": ()}
    answers = {
        name: Completion(request_id=name, token_ids=(1,), finish_reason="stop", accepted_per_round=accepted)
        for name, accepted in rounds.items()
    }
    dflash = dataclasses.replace(one_pass(1.0, 0.5), answers=answers)
    comparison = dataclasses.replace(COMPARISON, dflash=(dflash,))
    families = ["sums", "code", "sums", "none", *[None] * 6, "code"]
    found = report.by_family(comparison, families)
    assert found == {"accept_length_by_family": {"code": 1 + 10 / 4, "sums": 1 + 6 / 4}}
    assert "by family         sums 2.50, code 3.50\n" in report.results_table(measured() | found, 4)
    assert report.by_family(comparison, [None] * 11) == {}
    assert report.by_family(comparison, []) == {}


def test_the_table_distinguishes_ties_from_wrong_answers():
    table = report.results_table(measured(1e-4, 0.7, 0.9), 4)
    assert "6 of 9 answers equal plain greedy's, 1 differ at a tie, 2 WRONG" in table
    assert "in training" not in table
