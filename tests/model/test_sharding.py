"""Every way to split the model over eight devices gives what one device computes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
from oracle_environment import run_oracle
from safetensors.numpy import load_file, save_file

from pipeline.artifacts import PipelineError
from pipeline.model import placement
from pipeline.model.gpt_oss_config import GptOssConfig
from pipeline.model.gpt_oss_weights import WeightsForm
from pipeline.model.sharding import Shards

TOLERANCE = 1e-5
FORMS = {
    "wide": tiny_models.SPLIT_WIDE_TARGET,
    "apart": tiny_models.SPLIT_TARGET,
    "packed": tiny_models.SPLIT_PACKED_TARGET,
}
SIZES = [(d, e, t) for d in (1, 2, 4, 8) for e in (1, 2, 4, 8) for t in (1, 2, 4, 8) if d * e * t == 8]
CASES = [(size, form) for form in FORMS for size in SIZES]


def halve_logits(file: Path) -> None:
    """To a deviation of about one: float32's own rounding of larger ones is of the size of the bound."""
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["lm_head.weight"] / 2}, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def differences(tmp_path_factory):
    """Of every mesh and form, from one process with eight devices."""
    root = tmp_path_factory.mktemp("split")
    for name, hf in FORMS.items():
        (root / f"{name}.json").write_text(json.dumps(hf))
        out = root / ("floats" if name == "packed" else name)
        run_oracle("make_gpt_oss", config=root / f"{name}.json", seed=7, out=out)
        halve_logits(out / "model.safetensors")
    run_oracle("pack_mxfp4", model=root / "floats", out=root / "packed")
    here = Path(__file__).resolve()
    environment = os.environ | {"PYTHONPATH": str(here.parents[2])}
    cases = json.dumps(CASES)
    command = [sys.executable, str(here.with_name("eight_devices.py")), str(root), cases]
    made = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert made.returncode == 0, made.stderr[-4000:]
    return json.loads(made.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("size", "form"), CASES, ids=lambda value: value if isinstance(value, str) else "x".join(map(str, value))
)
def test_prefill_decode_verify_and_draft_equal_one_devices(differences, size, form):
    found = differences["x".join(map(str, size)) + f" {form}"]
    assert found["deviation"] > 0.9
    assert max(found[name] for name in ("prefill", "decode", "verify", "draft")) <= TOLERANCE, found
    assert found["tokens"] == 0


def test_a_mesh_that_does_not_divide_the_model_is_refused_with_every_reason():
    config = GptOssConfig.from_hf(tiny_models.TARGET)
    shards = Shards(1, 3, 4)
    with pytest.raises(PipelineError) as error:
        placement.require_divisible(config, WeightsForm(shards=shards))
    for part in (
        "the mesh does not divide the target evenly",
        "key/value heads: 2, mesh.expert x mesh.tensor is 12",
        "words of the vocabulary: 98, mesh.expert x mesh.tensor is 12",
        "rows of all experts: 200, mesh.expert x mesh.tensor is 12",
    ):
        assert part in str(error.value)
    with pytest.raises(PipelineError, match=r"experts: 33, mesh.expert is 2\n"):
        placement.require_divisible(GptOssConfig.from_hf(tiny_models.WIDE_TARGET), WeightsForm(shards=Shards(1, 2, 3)))


def test_a_mesh_of_another_size_than_the_machine_is_refused():
    with pytest.raises(PipelineError, match=r"is 2 x 1 x 3 = 6; there are \d+ devices"):
        placement.make_mesh(Shards(2, 1, 3))
