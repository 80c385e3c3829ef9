"""Times by a roofline, what follows from them, and how near they are to what others published."""

import dataclasses
import json

import pytest

from pipeline.cost.chips import CHIPS, Chip
from pipeline.errors import PipelineError
from pipeline.feasibility import bill as bills
from pipeline.feasibility import compiled, measured, report, stage, step_times
from pipeline.feasibility.bill import Texts
from pipeline.feasibility.step_times import Hardware, StepTimes
from pipeline.store.layout import CacheLayout
from pipeline.workspace import specs
from tests.support.configuration import composed
from tests.support.recorder import Recorder

TIMES = StepTimes(concurrency=2, block_size=8, plain=2.0, draft=1.0, verify=4.0, host=1.0)
SLOW = Chip(2**30, 1e9, 1e9)


def gpt_oss(name, block_size):
    config = composed(f"target=gpt_oss_{name}", f"draft.block_size={block_size}")
    model = specs.architecture(config.target.architecture)
    return model, specs.draft_sizes(config.draft, model, mask_token_id=0)


def machine(chip, **changes):
    values = {"num_devices": 1, "bandwidth_share": 0.6, "peak_share": 0.4, "agreement": 0.5}
    return Hardware(chip=chip, **(values | changes))


def test_speedup_is_accept_length_over_a_rounds_cost_in_plain_steps():
    assert (TIMES.round, TIMES.break_even) == (6.0, 2.0)
    assert [TIMES.speedup(length) for length in (1.0, 2.0, 6.0)] == [0.5, 1.0, 3.0]
    assert TIMES.largest_speedup == 4.0
    assert TIMES.tokens_per_second() == 2 / 3
    assert TIMES.tokens_per_second(3.0) == 1.0


def test_a_rate_at_every_position_makes_an_accept_length_and_picks_a_block_size():
    assert step_times.accept_length_of_rate(0.5, 3) == 1.75
    assert step_times.accept_length_of_rate(1.0, 8) == 8
    longer = dataclasses.replace(TIMES, block_size=16, verify=8.0)
    assert step_times.best_block_size([TIMES, longer], 0.5) is TIMES
    assert step_times.best_block_size([TIMES, longer], 1.0) is longer


def test_a_pass_takes_the_longer_of_reading_and_multiplying():
    model, draft = gpt_oss("20b", 8)
    reading = step_times.from_roofline(
        model, draft, machine(dataclasses.replace(SLOW, flops_per_second=1e30)), concurrency=1, context=64, packed=True
    )
    multiplying = step_times.from_roofline(
        model, draft, machine(dataclasses.replace(SLOW, bytes_per_second=1e30)), concurrency=1, context=64, packed=True
    )
    assert multiplying.verify == pytest.approx(8 * multiplying.plain)  # eight tokens are eight times the arithmetic
    assert reading.plain < reading.verify < 8 * reading.plain  # but read the same weights, and more experts


def test_tokens_that_agree_hit_fewer_experts():
    model, draft = gpt_oss("20b", 8)

    def verify(agreement):
        found = machine(CHIPS["h200"], agreement=agreement)
        return step_times.from_roofline(model, draft, found, concurrency=1, context=64, packed=True).verify

    alone = step_times.from_roofline(model, draft, machine(CHIPS["h200"]), concurrency=1, context=64, packed=True).plain
    assert verify(0.0) > verify(0.5) > verify(0.999) == pytest.approx(alone, rel=0.01)


@pytest.mark.parametrize(("concurrency", "published"), [(1, 1.8), (8, 1.6)])
def test_the_published_speedup_of_a_gpt_oss_draft_is_met_within_a_tenth(concurrency, published):
    """gpt-oss-120b with z-lab's draft of block size 10 on one H200, GSM8K, accept_length 5.3 (its model card)."""
    model, draft = gpt_oss("120b", 10)
    found = step_times.from_roofline(
        model, draft, machine(CHIPS["h200"]), concurrency=concurrency, context=1024, packed=True
    )
    assert found.speedup(5.3) == pytest.approx(published, rel=0.1)


def test_the_bill_counts_features_answers_and_training():
    _, draft = gpt_oss("20b", 8)
    texts = Texts(num_prompts=1000, prompt_tokens=100, answer_tokens=900)
    layout = CacheLayout(stored="bfloat16", feature_size=draft.feature_size, num_tapped=5)
    found = bills.bill(
        draft, texts, layout, machine(CHIPS["h200"]), plain_tokens_per_second=500.0, num_steps=100, batch_sequences=4,
        anchors=64,
    )  # fmt: skip
    assert found.cache_bytes == 10**6 * (4 + 1 + 2 * 5 * 2880)
    assert found.cache_hours == 900_000 / 500 / 3600
    assert found.train_hours > 0
    assert found.cost(2.0) == pytest.approx(2 * (found.cache_hours + found.train_hours))
    assert bills.cost_per_million(3.6, 1000.0) == pytest.approx(1.0)


def compile_report(path, programs):
    def costs(seconds, floor):
        return {"flops": 1.0, "bytes": 1.0, "seconds": seconds, "floor_seconds": floor}

    values = [{"name": name, "costs": None if pair is None else costs(*pair)} for name, pair in programs.items()]
    path.write_text(json.dumps({"programs": values}))
    return path


def test_a_compilers_report_gives_times_by_its_estimates_or_floors(tmp_path):
    programs = {"prefill": (9.0, 1.0), "decode": (2e-3, 1e-3), "dflash 4": (None, 3e-3), "dflash 8": (5e-3, 4e-3)}
    path = compile_report(tmp_path / "gpt-oss.json", programs | {"draft 8": (1e-3, 2e-3), "verify 8": (9.0, 9.0)})
    four, eight = compiled.from_report(path, concurrency=8)
    assert (four.block_size, four.break_even) == (4, pytest.approx(1.5))
    assert (eight.draft, eight.verify, eight.break_even) == pytest.approx((2e-3, 3e-3, 2.5))
    with pytest.raises(PipelineError, match="run stage=compile again"):
        compiled.from_report(compile_report(tmp_path / "none.json", {"decode": None}), concurrency=8)


def probe(tmp_path, *overrides):
    config = composed(f"output_dir={tmp_path}", "stage=feasibility", *overrides)
    tracker = Recorder()
    return stage.run(config, tracker), tracker


def test_the_stage_needs_no_weights_and_writes_what_it_prints(tmp_path, capsys):
    found, tracker = probe(
        tmp_path, "target=gpt_oss_20b", "feasibility.price_per_hour=2", "feasibility.chips=[v6e,h200]"
    )
    shown = capsys.readouterr().out
    assert shown.count("8 x v6e") == 9 + 1  # three loads of three block sizes, and the bill
    assert json.loads((tmp_path / "feasibility" / "gpt_oss_20b.json").read_text()) == found
    one = found["times"]["8 x h200"][0]
    assert one["speedups"]["4"] == pytest.approx(4 / one["break_even_accept_length"])
    assert one["plain_cost_per_million_tokens"] > 0
    assert tracker.documents["feasibility.json"] == found


def test_steps_are_measured_on_this_machine_at_random_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "REPEATS", 2)
    found, _ = probe(
        tmp_path, "feasibility.chips=[]", "feasibility.measure=true", "feasibility.block_sizes=[4]",
        "feasibility.concurrencies=[2]", "draft.block_size=4",
    )  # fmt: skip
    (one,) = found["times"][stage.HERE]
    assert (one["concurrency"], one["block_size"]) == (2, 4)
    assert 0 < one["plain_seconds"] < one["draft_seconds"] + one["verify_seconds"]
    assert one["largest_speedup"] == pytest.approx(4 / one["break_even_accept_length"])


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["feasibility.chips=[abacus]"], r"has abacus; it must be of v5e, "),
        (["feasibility.chips=[]"], "feasibility.chips is empty"),
    ],
)
def test_what_cannot_be_asked_is_refused(tmp_path, overrides, problem):
    with pytest.raises(PipelineError, match=problem):
        probe(tmp_path, *overrides)


def test_a_target_without_sizes_is_refused(tmp_path):
    with pytest.raises(PipelineError, match="target.path is somewhere, which is no directory"):
        probe(tmp_path, "target=local", "target.name=mine", "target.path=somewhere")


def test_a_line_marks_the_best_block_size():
    longer = dataclasses.replace(TIMES, block_size=16, verify=12.0)
    shown = report.times_table({"m": [TIMES, longer]}, [2.0, 9.0], 0.5).splitlines()
    assert len(shown) == 4
    assert shown[2].endswith("x*")
    assert not shown[3].rstrip().endswith("*")
