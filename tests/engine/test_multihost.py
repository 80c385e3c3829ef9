"""Two hosts decode as one does: processes on this machine, with four devices each."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from fitted_draft import fitted

from pipeline.serve.engine import Engine
from pipeline.serve.scheduler import Request

HERE = Path(__file__).resolve()
NUM_PROMPTS = 6


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize("mesh", ["4x1x2", pytest.param("4x2x1", marks=pytest.mark.slow)])
def test_two_hosts_give_the_tokens_of_one(tmp_path, mesh):
    models = fitted()
    prompts = models.prompts[:NUM_PROMPTS]
    alone = Engine(models.weights, models.config, stop_token_ids=[5, 71], slots=4, max_length=80, prefill_chunk=16,
                   draft=models.draft)  # fmt: skip
    asked = [Request(request_id=str(i), prompt_ids=tuple(ids), max_new_tokens=24) for i, ids in enumerate(prompts)]
    expected = {one.request_id: list(one.token_ids) for one in alone.generate(asked)}
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    command = [sys.executable, str(HERE.with_name("two_hosts.py"))]
    given = [str(free_port()), str(models.target_path), str(models.draft_path), str(tmp_path / "prompts.json"), mesh]
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[2])}
    running = [
        subprocess.Popen([*command, str(number), *given], env=environment, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True)
        for number in range(2)
    ]  # fmt: skip
    told = []
    for process in running:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-3000:]
        told.append(json.loads(out.splitlines()[-1]))
    assert told[0]["alike"] == told[1]["alike"] == expected
    assert told[0]["led"] == expected
    assert told[0]["followed_rounds"] == told[1]["followed_rounds"] > 0
