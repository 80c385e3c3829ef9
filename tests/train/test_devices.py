"""A training step on any mesh makes the losses that it makes on one device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

TOLERANCE = 1e-5
ALONE = (1, 1, 1)
MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 4)]
FORMS = {
    "padded rows, decay": {"packed": False},
    "packed rows, D-PACE, in two parts": {"packed": True, "dpace_smoothing": 0.5, "accumulation": 2, "remat": True},
    "padded rows, D-PACE, distilled": {"packed": False, "dpace_smoothing": 0.3, "distillation": 0.4},
    "packed rows, decay": {"packed": True},
}
EVERYWHERE = list(FORMS)[:2]  # the others on the mesh that splits along all axes
CASES = [(mesh, form) for form in FORMS for mesh in MESHES if form in EVERYWHERE or mesh == (2, 2, 2)]


@pytest.fixture(scope="module")
def trained():
    """Of every mesh and form, from one process with eight devices."""
    wanted = [(ALONE, form) for form in FORMS] + CASES
    here = Path(__file__).resolve()
    environment = os.environ | {"PYTHONPATH": str(here.parents[2])}
    cases = json.dumps([(mesh, FORMS[form]) for mesh, form in wanted])
    command = [sys.executable, str(here.with_name("eight_devices.py")), cases]
    made = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert made.returncode == 0, made.stderr[-4000:]
    return dict(zip(wanted, json.loads(made.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize(
    ("mesh", "form"), CASES, ids=lambda value: value if isinstance(value, str) else "x".join(map(str, value))
)
def test_losses_on_a_mesh_are_those_of_one_device(trained, mesh, form):
    alone, split = trained[ALONE, form], trained[mesh, form]
    assert np.isfinite(alone["losses"]).all()
    np.testing.assert_allclose(split["losses"], alone["losses"], rtol=TOLERANCE)
    assert split["others"]["num_tokens"] == alone["others"]["num_tokens"] > 0
    assert alone["losses"][-1] < alone["losses"][0]


@pytest.mark.parametrize("form", EVERYWHERE)
def test_a_device_holds_its_own_words_alone(trained, form):
    whole = 2 * 40 * 40 * 4  # two tables of 37 words, padded to 40, of 40 float32
    assert trained[(1, 8, 1), form]["held_bytes"] == whole / 8
    assert trained[(2, 2, 2), form]["held_bytes"] == whole / 4
    assert trained[(8, 1, 1), form]["held_bytes"] == 2 * 37 * 40 * 4
