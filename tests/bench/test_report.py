"""The numbers of a benchmark as values, as the table that ends a demo, and as metrics."""

import dataclasses
import json

import pytest

from pipeline.bench import breakdown, guards, report, table
from pipeline.bench.arms import DFLASH, PLAIN, ArmPass, Comparison
from pipeline.bench.breakdown import Labels
from pipeline.bench.losslessness import Difference, Losslessness
from pipeline.bench.timeline import Timeline
from pipeline.dflash.acceptance import Acceptance
from pipeline.engine.request import Completion
from pipeline.prompts.channels import ChannelTokens

ROUNDS = {"prompt-0": (3, 1, 0), "prompt-1": (2, 3), "prompt-2": (0,)}
KEYS = {
    "record_format",
    *("accept_length", "accept_length_low", "accept_length_high", "accept_rate"),
    *(f"accept_rate_at_{k}{end}" for k in (1, 2, 3) for end in ("", "_low", "_high")),
    *("speedup", "speedup_low", "speedup_high", "speedup_min", "speedup_max", "break_even_accept_length"),
    *("num_repeats", "num_prompts", "num_rounds", "decode_tokens"),
    *("equal_answers", "tied_answers", "largest_tie", "wrong_answers"),
    *("looping_answers", "left_out_answers", "cut_answers"),
}
ARM_KEYS = {
    *("tokens_per_second", "end_to_end_tokens_per_second", "tokens_per_second_of_a_user", "prefill_seconds"),
    *(f"{name}_p{percentile}_ms" for name in ("ttft", "tpot", "itl") for percentile in (50, 90, 99)),
}


def one_pass(seconds, rounds=ROUNDS):
    """Three answers of 10, 10 and 2 tokens, decoded one after another."""
    lengths = dict(zip(ROUNDS, (10, 10, 2), strict=True))
    answers = {
        name: Completion(
            request_id=name,
            token_ids=tuple(range(count)),
            finish_reason="length" if name == "prompt-1" else "stop",
            accepted_per_round=rounds.get(name, ()),
        )
        for name, count in lengths.items()
    }
    at, timelines = 0.0, {}
    for name, count in lengths.items():
        share = seconds * (count - 1) / 19
        timelines[name] = Timeline(submitted=at, arrivals=((at + 0.1, 1), (at + 0.1 + share, count - 1)))
        at += 0.1 + share
    return ArmPass(
        answers=answers,
        timelines=timelines,
        decode_tokens=19,
        decode_seconds=seconds,
        prefill_seconds=0.3,
        seconds=seconds + 0.3,
    )


COMPARISON = Comparison(
    passes={
        PLAIN: tuple(one_pass(seconds, {}) for seconds in (4.0, 3.0, 2.0)),
        DFLASH: tuple(one_pass(seconds) for seconds in (2.0, 1.0, 1.0)),
        "adaptive": tuple(one_pass(seconds) for seconds in (1.0, 1.0, 1.0)),
    },
    acceptance=Acceptance.of([3, 1, 0, 2, 3, 0], 4),
)
EVERYTHING = guards.select(COMPARISON.plain[0].answers, 0.1)


def lossless(*gaps):
    differences = tuple(
        Difference(request_id=f"prompt-{index}", position=4, plain_token=1, dflash_token=2, logit_gap=gap)
        for index, gap in enumerate(gaps)
    )
    return Losslessness(num_answers=9, differences=differences, tie_gap=1e-3)


def measured(*gaps, selection=EVERYTHING, **evaluation):
    return report.results(COMPARISON, lossless(*gaps), evaluation, selection, num_at_once=1)


def test_results_hold_every_measure_under_the_names_of_mlflow():
    found = measured(1e-4, 0.7, 0.9)
    assert found.keys() == KEYS | {f"{arm}_{name}" for arm in (PLAIN, DFLASH) for name in ARM_KEYS}
    assert found["accept_length"] == 1 + 9 / 6
    assert found["accept_rate"] == 9 / 18
    assert (found["speedup"], found["speedup_min"], found["speedup_max"]) == pytest.approx((2.0, 2.0, 3.0))
    assert found["speedup_low"] == pytest.approx(2.0)
    assert found["speedup_high"] == pytest.approx(3.0)
    assert found["break_even_accept_length"] == pytest.approx(1.25)  # that accept_length would have speedup 1
    assert (found["plain_tokens_per_second"], found["dflash_tokens_per_second"]) == pytest.approx((19 / 3, 19))
    assert found["plain_end_to_end_tokens_per_second"] == pytest.approx(22 / 3.3)
    assert (found["num_prompts"], found["num_rounds"], found["decode_tokens"], found["num_repeats"]) == (9, 6, 19, 3)
    assert (found["equal_answers"], found["tied_answers"], found["wrong_answers"]) == (6, 1, 2)
    assert (found["largest_tie"], found["cut_answers"]) == (1e-4, 1)
    assert json.loads(json.dumps(found)) == found


def test_looping_answers_are_left_out_of_acceptance_and_speed():
    some = dataclasses.replace(EVERYTHING, request_ids=("prompt-0", "prompt-2"), num_looping=1)
    found = measured(selection=some)
    assert found["accept_length"] == 1 + 4 / 4
    assert (found["num_rounds"], found["left_out_answers"]) == (4, 1)


def test_a_draft_is_compared_with_its_evaluations_in_training_and_at_export():
    found = measured(heldout={"accept_length": 2.0}, engine={"accept_length": 2.4})
    assert found["engine_over_training"] == pytest.approx(1.25)
    assert (found["training_accept_length"], found["export_accept_length"]) == (2.0, 2.4)


def test_a_server_that_does_not_say_what_answers_accepted_has_no_intervals_of_it():
    silent = dict.fromkeys((PLAIN, DFLASH), tuple(one_pass(1.0, {}) for _ in range(2)))
    comparison = Comparison(passes=silent, acceptance=Acceptance.of([3, 1], 4))
    found = report.results(comparison, lossless(), {}, EVERYTHING, num_at_once=1)
    assert (found["accept_length"], found["num_rounds"]) == (3.0, 2)
    assert "accept_length_low" not in found
    assert "accept_length     3.000 of 4\n" in table.results_table(found, 4)


def test_the_table_shows_every_number_a_demo_promises():
    found = measured(heldout={"accept_length": 2.0}, engine={"accept_length": 2.4})
    found["arms"] = report.arm_speedups(COMPARISON, EVERYTHING)
    lines = table.results_table(found, 4).splitlines()
    rows = dict(line.split("  ", 1) for line in lines[1:-1])
    assert lines[0] == lines[-1] == "-" * len(lines[0])
    assert max(map(len, lines[1:-1])) == len(lines[0])
    shown = {name.strip(): value.strip() for name, value in rows.items()}
    length = f"2.500 of 4 ({found['accept_length_low']:.2f} to {found['accept_length_high']:.2f})"
    assert shown == {
        "accept_length": length,
        "accept_rate": "0.500",
        "accept_rate_at_k": "0.67 0.50 0.33",
        "plain": "6 tokens/s; first token after 100.0 ms, then 157.89 ms a token (medians)",
        "DFLASH": "19 tokens/s; first token after 100.0 ms, then 52.63 ms a token (medians)",
        "speedup": "2.00x (2.00 to 3.00), 3 passes of each",
        "break-even": "accept_length 1.25, a round's cost in plain steps",
        "at adaptive": "speedup 3.00x (2.00 to 4.00)",
        "losslessness": "9 of 9 answers equal plain decoding's, 0 bugs",
        "in training": "accept_length 2.000 (here 125.0% of it)",
        "at export": "accept_length 2.400",
        "measured on": "9 prompts, 19 tokens, 1 cut at their length",
    }


def test_the_table_distinguishes_ties_from_bugs_and_ends_with_the_warnings():
    shown = table.results_table(measured(1e-4, 0.7, 0.9) | {"warnings": ["it rains"]}, 4)
    assert "6 of 9 answers equal plain decoding's, 1 near-ties (largest gap 0.0001), 2 bugs" in shown
    assert "in training" not in shown
    assert shown.endswith("\nWARNING: it rains")


def test_families_and_efforts_are_measured_apart_and_shown_from_the_shortest_to_the_longest():
    labels = [Labels(family=family, effort="low") for family in ("sums", "code", "sums")]
    found = report.breakdowns(COMPARISON, EVERYTHING, labels)
    assert found.keys() == {"family"}  # of one effort there is nothing to tell apart
    lengths = {name: one["accept_length"] for name, one in found["family"].items()}
    assert lengths == {"code": 1 + 5 / 2, "sums": 1 + 4 / 4}
    assert found["family"]["sums"]["num_rounds"] == 4
    assert found["family"]["sums"]["accept_length_low"] <= 2 <= found["family"]["sums"]["accept_length_high"]
    assert "by family         sums 2.00, code 3.50\n" in table.results_table(measured() | {"by": found}, 4)
    assert report.breakdowns(COMPARISON, EVERYTHING, []) == {}
    mixed = [
        dataclasses.replace(one, effort=effort) for one, effort in zip(labels, ("low", "high", "low"), strict=True)
    ]
    assert report.breakdowns(COMPARISON, EVERYTHING, mixed)["effort"].keys() == {"low", "high"}


def test_a_round_belongs_to_the_channel_of_its_first_token():
    """90 starts, 91 names a channel, 92 begins its text, 93 ends it; 1 is analysis, 3 is final."""
    tokens = ChannelTokens(ends=(93,), start=90, channel=91, message=92, names=((1,), (2,), (3,)))
    ids = (91, 1, 92, 50, 51, 52, 93, 90, 91, 3, 92, 60, 61, 93)
    # rounds begin at tokens 1, 3, 6 and 11 of the answer
    answer = Completion(request_id="a", token_ids=ids, finish_reason="stop", accepted_per_round=(1, 2, 4, 2))
    found = breakdown.by_channel([answer], [(7, 7)], tokens, 8)
    assert {name: (one["accept_length"], one["num_rounds"]) for name, one in found.items()} == {
        "analysis": (3.0, 1),
        "final": (3.0, 1),
        "other": (3.5, 2),
    }


def test_every_number_of_a_record_is_a_metric():
    found = measured()
    found["by"] = {"family": {"sums": {"accept_length": 2.0}}, "effort": {"low": {"accept_length": 3.0}}}
    found["arms"] = {"adaptive": {"speedup": 1.5}}
    found["sweep"] = [{"slots": 8, "speedup": 1.25}]
    profile = {"dflash_device_ms": 6.0, "plain_device_ms": 2.0, "dflash_host_share": 0.1}
    found["profile"] = {"1": profile}
    metrics = report.metrics(found)
    assert metrics["accept_length/sums"] == 2.0
    assert metrics["accept_length_by_effort/low"] == 3.0
    assert metrics["speedup/adaptive"] == 1.5
    assert metrics["speedup_by_load/8_slots"] == 1.25
    assert metrics["profile/round_in_plain_steps_1_slots"] == 3.0
    assert metrics["speedup"] == found["speedup"]
    assert "record_format" not in metrics
