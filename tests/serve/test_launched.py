"""`serve.engine`: another program's server started by the stage, alone and behind the gateway; a stand-in is it."""

import re
import stat
import subprocess
import sys
import threading
import time

import httpx
import pytest

from pipeline.config.choices import EngineName, ServeMode
from pipeline.errors import PipelineError
from pipeline.serve import stage
from tests.serve.test_stage import run_with_visitor
from tests.support.paths import TESTS
from tests.support.recorder import Recorder
from tests.support.served import random_pair

STAND_IN = TESTS / "support" / "programs" / "stand_in_engine.py"


@pytest.fixture
def config(tmp_path, tokenizer):
    found = random_pair(tmp_path, tokenizer)
    found.serve.engine = EngineName.sglang_jax
    found.serve.engine_python = str(interpreter(tmp_path / "python", "0.1.0rc0"))
    found.serve.engine_start_seconds = 60.0
    return found


def interpreter(path, version):
    """An interpreter that has some version of the engine, and whose engine is the stand-in."""
    path.write_text(
        f'#!/bin/sh\nif [ "$1" = -c ]; then echo {version}; exit; fi\nshift 2\nexec {sys.executable} {STAND_IN} "$@"\n'
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_the_command_is_printed_and_nothing_started(config, capsys):
    config.serve.dry_run = True
    stage.run(config, Recorder())
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "gpt_oss_sglang_jax" in line]
    assert f"--speculative-draft-model-path {config.export.path}" in line
    assert "--speculative-num-draft-tokens 5" in line


def test_another_version_is_refused_before_it_is_started(config, tmp_path):
    config.serve.engine_python = str(interpreter(tmp_path / "other", "0.2.0"))
    with pytest.raises(PipelineError, match=r"has sglang-jax 0.2.0; this pipeline knows the flags of 0.1.0rc0"):
        stage.run(config, Recorder())


def test_flags_that_the_engine_does_not_know_are_refused_before_it_is_started(config):
    config.serve.engine_args = ["--tensor-parallel", "8"]
    with pytest.raises(PipelineError, match=r"does not know --tensor-parallel; take what is yours out"):
        stage.run(config, Recorder())


def test_an_engine_that_is_not_there_is_one_clear_error(config):
    config.serve.engine_python = sys.executable
    with pytest.raises(PipelineError, match="has no package sglang-jax; install it in an environment of its own"):
        stage.run(config, Recorder())


def test_an_engine_that_ends_at_start_is_one_clear_error(config):
    config.serve.engine_args = ["--behaviour", "crash"]
    with pytest.raises(PipelineError, match=r"ended with 3 before it was healthy(.|\n)*cannot find the weights"):
        stage.run(config, Recorder())


def test_an_engine_that_cannot_serve_a_draft_says_so(config):
    config.serve.engine = EngineName.tpu_inference
    with pytest.raises(PipelineError, match=r"cannot serve a draft: GPT-OSS runs through torchax"):
        stage.run(config, Recorder())


def test_without_a_gateway_no_other_machine_is_let_in(config):
    config.serve.host = "0.0.0.0"
    with pytest.raises(PipelineError, match=r"set serve.gateway=true, which asks for keys, or serve.insecure=true"):
        stage.run(config, Recorder())


def test_a_gateway_needs_an_engine_that_takes_tokens(config):
    config.serve.engine, config.serve.gateway = EngineName.vllm, True
    with pytest.raises(PipelineError, match=r"serve.gateway stands before sglang_jax or sglang; serve.engine is vllm"):
        stage.run(config, Recorder())


def test_the_plain_arm_has_no_draft(config, capsys):
    config.serve.dry_run, config.serve.mode = True, ServeMode.plain
    stage.run(config, Recorder())
    assert "--speculative" not in capsys.readouterr().out


def test_an_engine_that_dies_while_it_serves_ends_the_command_with_its_status(config, capfd):
    config.serve.engine_args = ["--behaviour", "crash-later"]
    config.serve.port = 0

    def visit():
        address = announced(capfd, r"serves random on (http://\S+)")
        with pytest.raises(httpx.HTTPError):
            httpx.post(f"{address}/generate", json={"input_ids": [20]}, timeout=60)

    visitor = threading.Thread(target=visit)
    visitor.start()
    with pytest.raises(SystemExit) as ended:
        stage.run(config, Recorder())
    visitor.join()
    assert ended.value.code == 7
    assert not running_stand_ins(config)


def test_the_gateway_answers_until_a_signal_and_leaves_no_process(config, capfd):
    config.serve.gateway = True

    def visit(address):
        body = {"model": "random", "prompt": [20, 30], "max_tokens": 3, "return_token_ids": True}
        return httpx.post(f"{address}/v1/completions", json=body, timeout=60).json()

    notes, reply, _ = run_with_visitor(config, capfd, visit)
    assert reply["choices"][0]["token_ids"] == [21, 31, 100]  # no temperature: the gateway's default is 0
    assert notes.metrics["serve/requests"] == 1
    assert not running_stand_ins(config)


def test_a_gateway_ends_when_its_engine_does(config, capfd):
    config.serve.gateway = True
    config.serve.engine_args = ["--behaviour", "crash-later"]

    found = []

    def visit():
        address = announced(capfd, r"serving random \(\w+\) on (http://\S+)")
        body = {"model": "random", "prompt": [20], "max_tokens": 3}
        found.append(httpx.post(f"{address}/v1/completions", json=body, timeout=60).status_code)

    visitor = threading.Thread(target=visit)
    visitor.start()
    with pytest.raises(PipelineError, match="the engine behind the gateway ended with 7"):
        stage.run(config, Recorder())
    visitor.join()
    assert found == [502]


def announced(capfd, pattern):
    """The address that a server prints when it is ready."""
    text = ""
    while "Ctrl-C" not in text:
        time.sleep(0.05)
        text += capfd.readouterr().out
    return re.search(pattern, text)[1]


def running_stand_ins(config):
    found = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return re.findall(rf"stand_in_engine.py .*{re.escape(str(config.target.path))}", found)
