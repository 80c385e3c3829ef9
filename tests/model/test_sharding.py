"""Every way to split the model over eight devices gives what one device computes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from pipeline.errors import PipelineError
from pipeline.model import placement
from pipeline.model.gpt_oss.config import GptOssConfig
from pipeline.model.gpt_oss.weights import WeightFormat
from pipeline.model.parallel.shards import Shards
from tests.support import models as tiny_models
from tests.support.compiled import QUICKLY
from tests.support.oracles import run_oracle
from tests.support.paths import PROGRAMS, ROOT

TOLERANCE = 1e-5
FORMS = {
    "wide": tiny_models.SPLIT_WIDE_TARGET,
    "apart": tiny_models.SPLIT_TARGET,
    "packed": tiny_models.SPLIT_PACKED_TARGET,
}
SIZES = [(d, e, t) for d in (1, 2, 4, 8) for e in (1, 2, 4, 8) for t in (1, 2, 4, 8) if d * e * t == 8]
CASES = [(size, form) for form in FORMS for size in SIZES]
FEW = {(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)}  # each axis alone, and all together


def halve_logits(file: Path) -> None:
    """To a deviation of about one: float32's own rounding of larger ones is of the size of the bound."""
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["lm_head.weight"] / 2}, file, metadata={"format": "pt"})


def differences_of(root, cases):
    """Of meshes and forms, from one process with eight devices."""
    for name, hf in FORMS.items():
        (root / f"{name}.json").write_text(json.dumps(hf))
        out = root / ("floats" if name == "packed" else name)
        run_oracle("make_gpt_oss", config=root / f"{name}.json", seed=7, out=out)
        halve_logits(out / "model.safetensors")
    run_oracle("pack_mxfp4", model=root / "floats", out=root / "packed")
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | QUICKLY
    command = [sys.executable, str(PROGRAMS / "target_on_eight_devices.py"), str(root), json.dumps(cases)]
    made = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert made.returncode == 0, made.stderr[-4000:]
    return json.loads(made.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Of the meshes that split along one axis, and of one that splits along all."""
    return differences_of(tmp_path_factory.mktemp("few"), [case for case in CASES if case[0] in FEW])


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Of the others."""
    return differences_of(tmp_path_factory.mktemp("many"), [case for case in CASES if case[0] not in FEW])


def require_equal(differences, size, form):
    found = differences["x".join(map(str, size)) + f" {form}"]
    assert found["deviation"] > 0.9
    assert max(found[name] for name in ("prefill", "decode", "verify", "draft")) <= TOLERANCE, found
    assert found["tokens"] == 0


def named(value):
    return value if isinstance(value, str) else "x".join(map(str, value))


@pytest.mark.parametrize(("size", "form"), [case for case in CASES if case[0] in FEW], ids=named)
def test_prefill_decode_verify_and_draft_equal_one_devices(few, size, form):
    require_equal(few, size, form)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "form"), [case for case in CASES if case[0] not in FEW], ids=named)
def test_prefill_decode_verify_and_draft_equal_one_devices_on_every_other_mesh(many, size, form):
    require_equal(many, size, form)


def test_a_mesh_that_does_not_divide_the_model_is_refused_with_every_reason():
    config = GptOssConfig.from_hf(tiny_models.TARGET)
    shards = Shards(1, 3, 4)
    with pytest.raises(PipelineError) as error:
        placement.require_divisible_target(config, WeightFormat(shards=shards))
    for part in (
        "the mesh does not divide the target evenly",
        "key/value heads: 2, mesh.expert x mesh.tensor is 12",
        "tokens of the vocabulary: 98, mesh.expert x mesh.tensor is 12",
        "rows of all experts: 200, mesh.expert x mesh.tensor is 12",
    ):
        assert part in str(error.value)
    with pytest.raises(PipelineError, match=r"experts: 33, mesh.expert is 2\n"):
        placement.require_divisible_target(
            GptOssConfig.from_hf(tiny_models.WIDE_TARGET), WeightFormat(shards=Shards(1, 2, 3))
        )


def test_a_mesh_of_another_size_than_the_machine_is_refused():
    with pytest.raises(PipelineError, match=r"is 2 x 1 x 3 = 6; there are \d+ devices"):
        placement.make_mesh(Shards(2, 1, 3))
