"""A training step on any mesh makes the losses that it makes on one device."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.support.compiled import QUICKLY
from tests.support.paths import PROGRAMS, ROOT

TOLERANCE = 1e-5
ALONE = (1, 1, 1)
MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 4)]
FORMS = {
    "padded rows, decay": {"packed": False},
    "packed rows, D-PACE, in two parts": {"packed": True, "dpace_smoothing": 0.5, "accumulation": 2, "remat": True},
    "padded rows, D-PACE, distilled": {"packed": False, "dpace_smoothing": 0.3, "distillation": 0.4},
    "packed rows, decay": {"packed": True},
}
MIXED = (2, 2, 2)
CASES = [(MIXED, form) for form in list(FORMS)[:2]]
SLOW_CASES = [(mesh, form) for form in list(FORMS)[:2] for mesh in MESHES] + [(MIXED, form) for form in list(FORMS)[2:]]


def trained(cases: list) -> dict:
    """Of every mesh and form and of one device, from one process with eight devices."""
    wanted = list(dict.fromkeys([(ALONE, form) for _, form in cases] + cases))
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | QUICKLY
    given = json.dumps([(mesh, FORMS[form]) for mesh, form in wanted])
    command = [sys.executable, str(PROGRAMS / "training_on_eight_devices.py"), given]
    made = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert made.returncode == 0, made.stderr[-4000:]
    return dict(zip(wanted, json.loads(made.stdout.splitlines()[-1]), strict=True))


@pytest.fixture(scope="module")
def few():
    """Of the mesh that splits along all axes."""
    return trained(CASES)


@pytest.fixture(scope="module")
def many():
    """Of the meshes that split along one axis, and of further forms."""
    return trained(SLOW_CASES)


def require_equal(alone: dict, split: dict) -> None:
    assert np.isfinite(alone["losses"]).all()
    np.testing.assert_allclose(split["losses"], alone["losses"], rtol=TOLERANCE)
    assert split["others"]["num_tokens"] == alone["others"]["num_tokens"] > 0
    assert alone["losses"][-1] < alone["losses"][0]


@pytest.mark.parametrize("form", list(FORMS)[:2])
def test_losses_on_a_mesh_are_those_of_one_device(few, form):
    require_equal(few[ALONE, form], few[MIXED, form])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "form"), SLOW_CASES, ids=lambda value: value if isinstance(value, str) else "x".join(map(str, value))
)
def test_losses_on_every_mesh_are_those_of_one_device(many, mesh, form):
    require_equal(many[ALONE, form], many[mesh, form])


def test_a_device_holds_its_own_words_alone_and_no_table_is_ever_gathered(few):
    word = 2 * 40 * 4  # bytes of a word in both tables
    form = CASES[0][1]
    assert few[ALONE, form]["held_bytes"] == 53 * word
    assert few[MIXED, form]["held_bytes"] == 56 / 4 * word  # padded; two copies of the model share out theirs
    exchanged = few[MIXED, form]["exchanged"]
    assert len(exchanged) > 10
    assert not [sizes for sizes in exchanged if {53, 56} & set(sizes)]
