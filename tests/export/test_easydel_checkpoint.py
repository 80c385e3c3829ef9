"""EasyDeL's run directories, whatever mesh wrote them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from pipeline.errors import PipelineError
from pipeline.export.easydel_checkpoint import read_checkpoint
from pipeline.model.dflash import weights as dflash_weights
from tests.support.paths import PROGRAMS, ROOT
from tests.support.programs.saved_on_a_mesh import DRAFT

LIMIT_SECONDS = 300


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """A draft that eight devices saved, with an optimizer that holds the halves of its weights as their average."""
    run = tmp_path_factory.mktemp("runs") / "run-3"
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    command = [sys.executable, str(PROGRAMS / "saved_on_a_mesh.py"), str(run), "2x2x2"]
    made = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    assert made.returncode == 0, made.stderr[-4000:]
    return run


@pytest.fixture
def damaged(averaged, tmp_path):
    """A copy without the average, to be damaged."""
    run = Path(shutil.copytree(averaged, tmp_path / "run-3"))
    index = json.loads((run / "tensorstore_index.json").read_text())
    index["prefixes"]["tx"] = [entry for entry in index["prefixes"]["tx"] if "average" not in entry["path"]]
    (run / "tensorstore_index.json").write_text(json.dumps(index))
    return run


@pytest.fixture
def weights():
    """What one device makes of the same seed."""
    return jax.tree.leaves(dflash_weights.random_weights(DRAFT, nnx.Rngs(0).params()))


def parts(directory):
    return {file.name for file in directory.iterdir() if not file.name.startswith(".")}


def test_a_draft_that_eight_devices_saved_in_parts_is_the_one_that_one_device_makes(damaged, weights):
    assert parts(damaged / "model" / "fuse") == {"0.0", "0.1", "1.0", "1.1"}
    assert parts(damaged / "model" / "norm") == {"0"}
    for ours, theirs in zip(weights, jax.tree.leaves(read_checkpoint(damaged, DRAFT)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_draft_of_averaged_weights_is_the_average_that_training_evaluates(averaged, weights, tmp_path):
    for ours, halves in zip(weights, jax.tree.leaves(read_checkpoint(averaged, DRAFT)), strict=True):
        np.testing.assert_array_equal(ours / 2, halves)
    damaged = Path(shutil.copytree(averaged, tmp_path / "run-3"))
    shutil.rmtree(damaged / "tx" / "1" / "average" / "norm")
    with pytest.raises(PipelineError, match="tx/1/average/norm/value: missing"):
        read_checkpoint(damaged, DRAFT)


def test_a_part_that_is_missing_is_not_read_as_zeros(damaged):
    (damaged / "model" / "fuse" / "1.0").unlink()
    shutil.rmtree(damaged / "model" / "norm")
    with pytest.raises(PipelineError) as caught:
        read_checkpoint(damaged, DRAFT)
    assert "2 array(s) wrong" in str(caught.value)
    assert "model/fuse: missing (NOT_FOUND: chunk {1, 0}" in str(caught.value)
    assert "model/norm: missing" in str(caught.value)


def test_a_part_that_is_torn_is_named(damaged):
    part = damaged / "model" / "layers" / "1" / "gate" / "0.1"
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(PipelineError, match="model/layers/1/gate cannot be read"):
        read_checkpoint(damaged, DRAFT)


@pytest.mark.parametrize(
    "index", [None, "{", '{"prefixes": {"tx": []}}'], ids=["none", "torn", "of the optimizer alone"]
)
def test_a_directory_without_a_readable_index_is_no_run_directory(damaged, index):
    file = damaged / "tensorstore_index.json"
    file.unlink() if index is None else file.write_text(index)
    with pytest.raises(PipelineError, match="no run directory of EasyDeL's|holds no weights"):
        read_checkpoint(damaged, DRAFT)
