"""The whole stage on a tiny target and draft with random weights, ended by a signal as a person ends it."""

import contextlib
import os
import re
import signal
import threading
import time

import httpx
import openai
import pytest

from pipeline.config.schema import EngineSettings, PipelineConfig, ServeConfig, TargetConfig
from pipeline.engine.config import EngineConfig
from pipeline.engine.engine import Engine
from pipeline.engine.request import Request
from pipeline.errors import PipelineError
from pipeline.model.gpt_oss.weights import WeightFormat
from pipeline.model.hf.directory import read_target
from pipeline.prompts.chat_format import render_prompt, stop_token_ids
from pipeline.serve import server, stage
from pipeline.workspace.workspace import Workspace
from tests.support.recorder import Recorder
from tests.support.served import random_pair

pytestmark = pytest.mark.usefixtures("compiled_quickly")

USER = {"role": "user", "content": "What is 17 + 25?"}


@pytest.fixture(scope="module")
def config(tmp_path_factory, tokenizer):
    return random_pair(tmp_path_factory.mktemp("served"), tokenizer)


def run_with_visitor(config, capsys, visit):
    """Run the stage in this thread while `visit(address)` runs in another, which ends it with SIGINT."""
    notes, found = Recorder(), []

    def come_and_go():
        deadline = time.monotonic() + 120
        text = ""
        while time.monotonic() < deadline and "Ctrl-C" not in text:
            time.sleep(0.05)
            text += capsys.readouterr().out
        try:
            address = re.search(r"serving random \(\w+\) on (http://\S+)", text)[1]
            found.append((visit(address), text))
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    visitor = threading.Thread(target=come_and_go)
    visitor.start()
    with contextlib.suppress(KeyboardInterrupt):  # only when the stage ended too early, and pytest has said why
        stage.run(config, notes)
    visitor.join()
    return notes, *found[0]


def test_a_draft_is_served_with_plain_greedys_tokens_until_a_signal(config, tokenizer, capsys):
    prompt = render_prompt(tokenizer, [USER], "low")
    options = {"model": "random", "max_tokens": 30, "temperature": 0}

    def visit(address):
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            chat = client.chat.completions.create(messages=[USER], **options)
            texts = client.completions.create(
                prompt=[prompt, [5, 6, 7]], **options, extra_body={"return_token_ids": True}
            )
            sampled = [
                client.completions.create(
                    model="random",
                    prompt=[prompt, prompt],
                    max_tokens=12,
                    temperature=1.5,
                    seed=seed,
                    extra_body={"return_token_ids": True, "top_k": 50, "ignore_eos": True},
                )
                for seed in (1, 1, 2)
            ]
        first, again, other = ([choice.token_ids for choice in one.choices] for one in sampled)
        assert first == again != other
        assert first[0] != first[1]  # one request's prompts are drawn independently
        assert {len(ids) for ids in first + other} == {12}
        return chat, texts, httpx.get(f"{address}/metrics").text

    notes, (chat, texts, metrics), output = run_with_visitor(config, capsys, visit)

    target = read_target(Workspace(config).target.path, WeightFormat())
    stops = tuple(stop_token_ids(tokenizer))
    plain = Engine(target, None, EngineConfig(num_slots=1, max_length=96, prefill_chunk=16, stop_token_ids=stops))
    wanted = {
        one.request_id: list(one.token_ids)
        for one in plain.generate(
            Request(request_id=str(index), prompt_ids=tuple(ids), max_new_tokens=30)
            for index, ids in enumerate([prompt, [5, 6, 7]])
        )
    }
    assert [choice.token_ids for choice in texts.choices] == [wanted["0"], wanted["1"]]
    assert chat.usage.completion_tokens == len(wanted["0"])
    assert chat.usage.prompt_tokens == len(prompt)
    assert "curl http://127.0.0.1:" in output
    rounds = float(re.search(r"^serve_rounds_total (\S+)$", metrics, re.MULTILINE)[1])
    assert rounds > 0
    assert notes.metrics["accept_length"] >= 1
    assert notes.metrics["serve/requests"] == 9
    assert notes.metrics["serve/generated_tokens"] == 2 * len(wanted["0"]) + len(wanted["1"]) + 6 * 12


def test_more_positions_than_the_target_has_are_refused(config):
    large = PipelineConfig(target=config.target, export=config.export, engine=EngineSettings(max_length=257))
    large.serve.port = 0
    with pytest.raises(PipelineError, match=r"engine.max_length is 257; random has 256 positions"):
        stage.run(large, Recorder())


def test_a_port_in_use_is_refused_before_anything_is_loaded(config):
    with contextlib.closing(server.bind("127.0.0.1", 0)) as listener:
        listener.listen()
        port = listener.getsockname()[1]
        busy = PipelineConfig(target=TargetConfig(name="none", path="/nowhere"), serve=ServeConfig(port=port))
        with pytest.raises(PipelineError, match=f"serve.port is {port}, which is in use"):
            stage.run(busy, Recorder())


def test_a_draft_that_was_never_exported_is_named(config, tmp_path):
    absent = PipelineConfig(target=config.target, engine=EngineSettings(max_length=96))
    absent.serve.port = 0
    absent.export.path = str(tmp_path / "none")
    with pytest.raises(PipelineError, match=r"no complete draft at .*stage=export"):
        stage.run(absent, Recorder())
