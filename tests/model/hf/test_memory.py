"""What reading a checkpoint of three gigabytes takes of the host's memory."""

import json
import os
import subprocess
import sys

import pytest

from tests.support.paths import PROGRAMS, ROOT, TESTS

LAYERS = 6
LARGEST_IN_FILES = 32 * 5760 * 1440  # bytes of gate_up_proj_blocks


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """gpt-oss-20b's layout with a quarter of its layers and a sixth of its vocabulary, in sixteen files."""
    published = json.loads((TESTS / "compile" / "gpt_oss_20b.json").read_text())
    hf = published | {"num_hidden_layers": LAYERS, "vocab_size": 32768}
    directory = tmp_path_factory.mktemp("three-gigabytes")
    written = measure("write", directory, hf, {})
    assert written["file_bytes"] > 3e9
    assert len(list(directory.glob("*.safetensors"))) == 16
    yield directory, hf
    for file in directory.iterdir():
        file.unlink()


def measure(what, directory, hf, form, *more):
    program, settings = str(PROGRAMS / "load_and_measure.py"), (json.dumps(hf), json.dumps(form))
    command = [sys.executable, program, what, str(directory), *settings, *more]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    made = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(made.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(("packed", "adapter"), [(True, ()), (False, ()), (False, ("adapter",))])
def test_the_host_holds_no_more_than_the_weights_and_a_few_tensors(checkpoint, tmp_path, packed, adapter):
    directory, hf = checkpoint
    form = {"dtype": "bfloat16", "packed": packed}
    found = measure("read", directory, hf, form, *(str(tmp_path / name) for name in adapter))
    print(f"{found['bytes_per_parameter']:.3f} bytes a parameter, {found['peak_bytes'] / 2**30:.2f} GiB at the most")
    largest = max(found["largest_bytes"], LARGEST_IN_FILES)
    bound = found["resident_bytes"] + 2 * largest
    if adapter:  # a tensor that is changed is copied once more, and the adapter's file is read through memory
        bound += largest + (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert found["peak_bytes"] <= bound
