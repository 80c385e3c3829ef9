"""A draft trained by two hosts is the one that a single host trains."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import tiny_training

from pipeline import lineage
from pipeline.export.run_directory import read_checkpoint

HERE = Path(__file__).resolve()
TRAIN = {"batch_sequences": 8, "steps": 4, "eval_steps": 4, "checkpoint_steps": 2}


def test_two_hosts_train_the_draft_that_one_does(tmp_path):
    config = tiny_training.prepare(tmp_path / "two", **TRAIN)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (HERE.parents[2], HERE.parents[1])))}
    command = [sys.executable, str(HERE.with_name("two_hosts.py"))]
    given = [str(port), str(tmp_path / "two"), json.dumps(TRAIN)]
    both = [
        subprocess.Popen(
            [*command, str(process), *given], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for process in range(2)
    ]
    told = [one.communicate(timeout=tiny_training.LIMIT_SECONDS) for one in both]
    assert [one.returncode for one in both] == [0, 0], [errors[-3000:] for _, errors in told]

    alone = tiny_training.prepare(tmp_path / "one", **TRAIN)
    with tiny_training.start(tmp_path / "one", **TRAIN) as process:
        output, errors = process.communicate(timeout=tiny_training.LIMIT_SECONDS)
    assert process.returncode == 0, errors

    def losses(text):
        told = json.loads(text.splitlines()[-1])  # behind what JAX says of its hosts
        return [value for name, _, value in told if name == "train/loss"]

    np.testing.assert_allclose(losses(told[0][0]), losses(output), rtol=1e-5)
    draft = lineage.draft_config(config, lineage.target(config))
    found, wanted = (
        read_checkpoint(lineage.checkpoint(one, lineage.target(one)).path / "run-4", draft) for one in (config, alone)
    )
    for array, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(array, other, rtol=1e-4, atol=1e-5)
