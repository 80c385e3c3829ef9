"""stage=roofline on sizes small enough for a test: every pass is timed and reported."""

import contextlib
import io
import math

import pytest

from pipeline.config.choices import ExpertWeights
from pipeline.config.schema import ArchitectureConfig, PipelineConfig, RooflineConfig, TargetConfig
from pipeline.cost import machine_speed
from pipeline.errors import PipelineError
from pipeline.model.parallel.runtime import SINGLE_DEVICE
from pipeline.roofline import stage
from tests.support.recorder import Recorder

pytestmark = pytest.mark.usefixtures("compiled_quickly")


def configuration(**changes):
    sizes = {
        "vocab_size": 90,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "num_local_experts": 20,
        "num_experts_per_tok": 4,
        "sliding_window": 16,
        "max_position_embeddings": 256,
        "rope_positions": 64,
    }
    target = TargetConfig(name="small", architecture=ArchitectureConfig(**sizes), **changes)
    wanted = RooflineConfig(batches=[1, 3], prefill_tokens=12, verify_tokens=4, context=20, repeats=2, expert_tokens=4)
    return PipelineConfig(target=target, roofline=wanted)


@pytest.fixture(scope="module")
def runs():
    """Tracker, results and output of the stage, with experts in floats and packed."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine_speed, "COPY_BYTES", 2**20)
        for name, weights in (("floats", None), ("packed", ExpertWeights.mxfp4)):
            tracker, out = Recorder(), io.StringIO()
            with contextlib.redirect_stdout(out):
                results = stage.run(configuration(weights=weights), tracker)
            found[name] = results, tracker, out.getvalue()
    return found


@pytest.mark.parametrize("weights", ["floats", "packed"])
def test_every_pass_and_the_experts_are_timed(runs, weights):
    results, tracker, out = runs[weights]
    passes = [
        (one["timed"]["name"], one["timed"]["num_rows"], one["timed"]["tokens_per_row"]) for one in results["passes"]
    ]
    assert passes == [("prefill", 1, 12), ("decode", 1, 1), ("decode", 3, 1), ("verify", 1, 4), ("verify", 3, 4)]
    assert all(one["seconds"] > 0 and math.isfinite(one["share"]) for one in results["passes"])
    assert [count for count, *_ in results["experts"]] == [1, 4]
    assert tracker.metrics["roofline/decode_1_seconds"] > 0
    assert "share of copy" in out
    assert "per expert" in out


def test_a_packed_target_reads_less_than_one_in_floats(runs):
    floats, packed = (runs[name][0]["passes"][0]["read_bytes"] for name in ("floats", "packed"))
    assert packed < floats


def test_a_copy_has_a_bandwidth():
    assert machine_speed.copy_bandwidth(SINGLE_DEVICE) > 1e8


def test_without_sizes_there_is_nothing_to_time():
    with pytest.raises(PipelineError, match="choose target=gpt_oss_20b"):
        stage.run(PipelineConfig(target=TargetConfig(name="given", path="somewhere")), Recorder())
