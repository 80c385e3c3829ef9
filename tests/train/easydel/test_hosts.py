"""A draft trained by two hosts is the one that a single host trains."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from pipeline.config.fields import CHECKPOINT
from pipeline.export.easydel_checkpoint import read_checkpoint
from pipeline.workspace.workspace import Workspace
from tests.support import training as tiny_training
from tests.support.compiled import QUICKLY
from tests.support.paths import PROGRAMS, ROOT
from tests.support.ports import free_port


@pytest.mark.multihost
def test_two_hosts_train_the_draft_that_one_does(tmp_path):
    alone = tiny_training.trained()
    config = tiny_training.prepare(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | QUICKLY
    command = [sys.executable, str(PROGRAMS / "training_on_two_hosts.py")]
    given = [str(free_port()), str(tmp_path), "{}"]
    both = [
        subprocess.Popen(
            [*command, str(process), *given], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for process in range(2)
    ]
    printed = [one.communicate(timeout=tiny_training.LIMIT_SECONDS) for one in both]
    assert [one.returncode for one in both] == [0, 0], [errors[-3000:] for _, errors in printed]

    def losses(text):
        tracked = json.loads(text.splitlines()[-1])  # behind what JAX says of its hosts
        return [value for name, _, value in tracked if name == "train/loss"]

    wanted = losses((tiny_training.root_of(alone) / "tracked.json").read_text())
    assert len(wanted) == alone.train.steps
    np.testing.assert_allclose(losses(printed[0][0]), wanted, rtol=1e-5)
    draft = Workspace(config).draft_config
    runs = [next(Workspace(one).open(CHECKPOINT).path.glob("run-*")) for one in (config, alone)]
    assert runs[0].name == runs[1].name
    found, wanted = (read_checkpoint(run, draft) for run in runs)
    for array, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(array, other, rtol=1e-4, atol=1e-5)
