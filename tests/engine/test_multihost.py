"""Two hosts decode as one does: processes on this machine, with four devices each."""

import json
import os
import subprocess
import sys

import pytest

from pipeline.engine.config import EngineConfig
from pipeline.engine.engine import Engine
from pipeline.engine.request import Request
from tests.support.compiled import QUICKLY
from tests.support.fitted import fitted
from tests.support.grammars import constrained
from tests.support.paths import PROGRAMS, ROOT
from tests.support.ports import free_port

pytestmark = [pytest.mark.multihost, pytest.mark.usefixtures("compiled_quickly")]
NUM_PROMPTS = 6


@pytest.mark.parametrize("mesh", ["4x1x2", pytest.param("4x2x1", marks=pytest.mark.slow)])
def test_two_hosts_give_the_tokens_of_one(tmp_path, mesh):
    models = fitted()
    prompts = models.prompts[:NUM_PROMPTS]
    config = EngineConfig(num_slots=4, max_length=80, prefill_chunk=16, stop_token_ids=(5, 71), samples=True)
    alone = Engine(models.target, models.draft, config)
    asked = [Request(request_id=str(i), prompt_ids=tuple(ids), max_new_tokens=24) for i, ids in enumerate(prompts)]
    expected = {one.request_id: list(one.token_ids) for one in alone.generate(asked)}
    masked = {one.request_id: list(one.token_ids) for one in alone.generate(constrained(asked))}
    assert all(token % 3 == 0 for answer in masked.values() for token in answer)
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    command = [sys.executable, str(PROGRAMS / "engine_on_two_hosts.py")]
    given = [str(free_port()), str(models.target_path), str(models.draft_path), str(tmp_path / "prompts.json"), mesh]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | QUICKLY
    running = [
        subprocess.Popen([*command, str(number), *given], env=environment, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True)
        for number in range(2)
    ]  # fmt: skip
    printed = []
    for process in running:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-3000:]
        printed.append(json.loads(out.splitlines()[-1]))
    assert printed[0]["alike"] == printed[1]["alike"] == expected
    assert printed[0]["broadcast"] == expected
    assert printed[0]["constrained"] == masked
    assert printed[0]["followed_rounds"] == printed[1]["followed_rounds"] > 0
