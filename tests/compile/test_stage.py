"""stage=compile: what it compiles for slices that are not here, and what it refuses."""

import importlib.util
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from pipeline.compile import report, topology
from pipeline.compile.report import Costs, ProgramReport
from pipeline.config.schema import MeshConfig
from pipeline.cost import memory_traffic
from pipeline.cost.chips import CHIPS, GIB
from pipeline.errors import PipelineError
from pipeline.model.gpt_oss.config import GptOssConfig
from pipeline.model.gpt_oss.weights import WeightFormat, random_weights
from pipeline.model.parallel.shards import Shards
from pipeline.workspace.loading import choose_shards
from tests.support.paths import ROOT

REDUCED = [
    "target.architecture.num_hidden_layers=4",
    "draft.num_hidden_layers=1",
    "draft.num_tapped_layers=2",
    "engine.max_length=2048",
    "compile.block_sizes=[8]",
    "train.anchors_per_sequence=16",
    "teacher_cache.max_prompt_tokens=128",
    "teacher_cache.max_new_tokens=128",
]
has_libtpu = importlib.util.find_spec("libtpu") is not None


def run(tmp_path, *overrides):
    command = [sys.executable, "-m", "pipeline", "stage=compile", f"output_dir={tmp_path}", *overrides]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_an_unknown_chip_is_refused():
    with pytest.raises(PipelineError, match="compile.topology is v9:2x4; it must be one of v5e, v5p, v6e and a size"):
        topology.slice_of("v9:2x4")


@pytest.mark.skipif(has_libtpu, reason="libtpu is installed here")
def test_without_libtpu_one_error_says_how_to_get_it(tmp_path):
    found = run(tmp_path, "target=gpt_oss_20b")
    assert found.returncode == 2
    assert "stage=compile needs the libtpu of this version of JAX" in found.stderr
    assert "pip install -e '.[tpu]'" in found.stderr


def test_what_is_larger_than_the_chips_memory_does_not_fit():
    decode = ProgramReport(name="decode", seconds_to_compile=1.0, argument_bytes=15 * GIB, temporary_bytes=2 * GIB)
    assert report.does_not_fit(decode, CHIPS["v6e"]) == []
    (problem,) = report.does_not_fit(decode, CHIPS["v5e"])
    assert problem == ("does not fit: 15.00 GiB of arguments and 2.00 GiB of temporaries, the chip has 16 GiB")


def test_the_table_has_a_line_a_program_and_names_problems():
    costs = Costs(flops=2e9, bytes=3e9, seconds=None, floor_seconds=0.004)
    reports = [
        ProgramReport(name="decode", seconds_to_compile=12.3, argument_bytes=GIB, temporary_bytes=GIB, costs=costs),
        ProgramReport(name="dflash 8", seconds_to_compile=1.0, problems=("does not compile: because",)),
    ]
    lines = report.program_table(reports, CHIPS["v5e"]).splitlines()
    assert lines[2].split() == "decode 12 s 1.00 GiB 1.00 GiB 12% 2.0 G 3.00 GB 0 MiB - 4.00 ms".split()
    assert lines[3].split() == ["dflash", "8", "not"]
    assert lines[-1] == "  PROBLEM: does not compile: because"


@pytest.mark.parametrize(
    ("given", "num_devices", "heads", "expected"),
    [
        ({}, 8, [8, 8], (1, 1, 8)),
        ({}, 32, [8, 8], (4, 1, 8)),
        ({}, 4, [8, 8], (1, 1, 4)),
        ({}, 8, [8, 6], (4, 1, 2)),
        ({}, 1, [3], (1, 1, 1)),
        ({"expert": 4, "tensor": 2}, 8, [8], (1, 4, 2)),
        ({"data": 8}, 8, [8], (8, 1, 1)),
    ],
)
def test_the_mesh_is_the_one_given_or_splits_the_model_as_far_as_heads_allow(given, num_devices, heads, expected):
    assert choose_shards(MeshConfig(**given), num_devices, heads) == Shards(*expected)


def test_the_bytes_of_a_step_are_those_of_the_weights_it_reads():
    """Every expert hit: all weights but the embedding, the norms, the biases and the sinks."""
    hf = json.loads((ROOT / "tests" / "compile" / "gpt_oss_20b.json").read_text())
    config = GptOssConfig.from_hf(hf)
    for packed in (False, True):
        shapes = jax.eval_shape(
            lambda packed=packed: random_weights(config, jax.random.key(0), WeightFormat("bfloat16", packed))
        )
        held = sum(np.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes) if leaf.ndim > 1)
        held -= np.prod(shapes.embedding.shape) * 2
        if packed:  # rows are padded, 2880 to 2944
            experts = [leaf for one in shapes.layers for name in ("gate", "up", "down")
                       for leaf in jax.tree.leaves(getattr(one.experts, name))]  # fmt: skip
            matrices = sum(np.prod(leaf.shape) * leaf.dtype.itemsize for leaf in experts)
            held -= matrices * (1 - 2880 / 2944)
        read = memory_traffic.target_bytes(config, 10_000, 1, 0, packed=packed)
        assert read == pytest.approx(held, rel=5e-3)
    assert memory_traffic.experts_hit(config, 1) == pytest.approx(4)
    assert memory_traffic.experts_hit(config, 8) == pytest.approx(32 * (1 - (28 / 32) ** 8))


@pytest.mark.slow
@pytest.mark.skipif(not has_libtpu, reason="needs the tpu extra")
def test_gpt_oss_20b_at_reduced_depth_compiles_for_a_slice(tmp_path):
    found = run(tmp_path, "target=gpt_oss_20b", "compile.topology=v6e:2x4", *REDUCED)
    assert found.returncode == 0, found.stderr[-3000:]
    reports = json.loads((tmp_path / "compile" / "gpt_oss_20b-v6e-2x4.json").read_text())["programs"]
    names = ["prefill", "decode", "decode beside a draft", "context", "dflash 8", "draft 8", "verify 8", "train"]
    assert [one["name"] for one in reports] == names
    for one in reports:
        assert one["problems"] == []
        assert one["costs"]["flops"] > 0 < one["argument_bytes"]
        assert one["collectives"]


@pytest.mark.slow
@pytest.mark.skipif(not has_libtpu, reason="needs the tpu extra")
def test_what_does_not_fit_ends_with_an_error_after_the_table(tmp_path):
    found = run(tmp_path, "target=gpt_oss_20b", "compile.topology=v5e:2x2", *REDUCED, "engine.max_length=131072",
                "serve.slots=256", "compile.training=false")  # fmt: skip
    assert found.returncode == 2
    assert "PROBLEM: does not" in found.stdout
    assert "error: gpt_oss_20b on v5e:2x2:" in found.stderr
