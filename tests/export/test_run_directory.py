"""EasyDeL's run directories, whatever mesh wrote them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from saved_on_a_mesh import DRAFT

from pipeline.artifacts import PipelineError
from pipeline.export.run_directory import read_checkpoint

TESTS = Path(__file__).resolve().parents[1]
LIMIT_SECONDS = 300


def saved(directory, mesh):
    num_devices = int(np.prod([int(size) for size in mesh.split("x")]))
    environment = os.environ | {
        "PYTHONPATH": str(TESTS.parent),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}",
    }
    command = [sys.executable, str(TESTS / "saved_on_a_mesh.py"), str(directory), mesh]
    made = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    assert made.returncode == 0, made.stderr[-4000:]
    return directory


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """A draft that eight devices saved."""
    return saved(tmp_path_factory.mktemp("runs") / "run-3", "2x2x2")


@pytest.fixture
def damaged(split, tmp_path):
    return Path(shutil.copytree(split, tmp_path / "run-3"))


def test_a_draft_that_eight_devices_saved_in_parts_is_the_one_that_one_device_saved(split, tmp_path):
    alone = saved(tmp_path / "run-3", "1x1x1")
    assert {file.name for file in (split / "model" / "fuse").iterdir() if file.name[0] != "."} == {
        "0.0",
        "0.1",
        "1.0",
        "1.1",
    }
    assert [file.name for file in (alone / "model" / "fuse").iterdir() if file.name[0] != "."] == ["0.0"]
    leaves = [jax.tree.leaves(read_checkpoint(run, DRAFT)) for run in (split, alone)]
    for ours, theirs in zip(*leaves, strict=True):
        np.testing.assert_array_equal(ours, theirs)


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
    with pytest.raises(PipelineError, match="no run directory of EasyDeL's"):
        read_checkpoint(damaged, DRAFT)
