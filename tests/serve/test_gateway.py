"""A server before another program's engine, which a stand-in is: it writes the prompt's tokens, each one up."""

import contextlib
import re
import sys

import httpx
import openai
import pytest

from pipeline.engine.config import EngineConfig
from pipeline.external.launcher import LaunchedServer
from pipeline.serve.remote_engine import RemoteEngine
from tests.support.paths import TESTS
from tests.support.ports import free_port
from tests.support.serving import MODEL, client_of, serving

STAND_IN = TESTS / "support" / "programs" / "stand_in_engine.py"
STOP = 150
IDS = {"return_token_ids": True}


@contextlib.contextmanager
def stand_in(behaviour="fine"):
    port = free_port()
    command = [sys.executable, str(STAND_IN), "--port", str(port), "--behaviour", behaviour]
    server = LaunchedServer(command, url=f"http://127.0.0.1:{port}", on_line=print)
    try:
        server.wait_until_healthy("/health", 60.0, print)
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def gateway(tokenizer, engine, plain_url=None):
    config = EngineConfig(num_slots=4, max_length=120, prefill_chunk=16, stop_token_ids=(STOP,))
    with (
        contextlib.closing(RemoteEngine(engine.url, config, len(tokenizer), plain_url=plain_url)) as remote,
        serving(remote, tokenizer) as address,
    ):
        yield address


@pytest.fixture(scope="module")
def engine():
    with stand_in() as server:
        yield server


@pytest.fixture
def address(engine, tokenizer):
    with gateway(tokenizer, engine) as found:
        yield found


def completion(address, prompt, **more):
    with client_of(address) as client:
        return client.completions.create(model=MODEL, prompt=prompt, temperature=0, **more)


def test_tokens_come_back_and_are_cut_at_the_length_that_was_asked_for(address):
    found = completion(address, [20, 30, 40], max_tokens=6, extra_body=IDS)
    assert found.choices[0].token_ids == [21, 31, 41, 100, 101, 102]  # the engine wrote eight
    assert found.choices[0].finish_reason == "length"
    assert found.usage.completion_tokens == 6


def test_the_token_that_ended_an_answer_is_there(address):
    found = completion(address, [20], max_tokens=80, extra_body=IDS).choices[0]
    assert found.token_ids == [21, *range(100, STOP + 1)]
    assert found.finish_reason == "stop"


def test_a_stop_token_that_the_engine_wrote_past_its_length_ends_the_answer(address):
    """At the length the engine does not look for stop tokens, and has them in its answer, with tokens behind them."""
    found = completion(address, [20], max_tokens=STOP - 100 + 3, extra_body=IDS).choices[0]
    assert found.token_ids == [21, *range(100, STOP + 1)]
    assert found.finish_reason == "stop"


def test_a_streams_pieces_are_the_whole_answer(address):
    with client_of(address) as client:
        stream = client.completions.create(
            model=MODEL, prompt=[20, 30], max_tokens=11, temperature=0, stream=True, extra_body=IDS
        )
        ids = [token for chunk in stream for choice in chunk.choices for token in choice.token_ids or []]
    assert ids == [21, 31, *range(100, 109)]


def test_prompts_of_one_request_and_many_requests_do_not_mix(address):
    found = completion(address, [[20], [30], [40]] * 4, max_tokens=3, extra_body=IDS)
    assert [choice.token_ids for choice in found.choices] == [[21, 100, 101], [31, 100, 101], [41, 100, 101]] * 4


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"temperature": 0.7}, "temperature"),
        ({"temperature": 0, "frequency_penalty": 1}, "frequency_penalty"),
        ({"temperature": 0, "logit_bias": {"5": 3}}, "logit_bias"),
        ({"temperature": 0, "logprobs": 2}, "logprobs"),
    ],
)
def test_what_the_engine_cannot_do_is_refused_by_name(address, asked, named):
    reply = httpx.post(f"{address}/v1/completions", json={"model": MODEL, "prompt": [20], "max_tokens": 3} | asked)
    assert reply.status_code == 400
    assert named in reply.json()["error"]["message"]
    assert completion(address, [20], max_tokens=3).usage.completion_tokens == 3  # and the others go on


def test_what_samples_goes_to_the_plain_arm_where_there_is_one(engine, tokenizer):
    with stand_in() as plain, gateway(tokenizer, engine, plain.url) as address, client_of(address) as client:
        found = client.completions.create(model=MODEL, prompt=[20], max_tokens=3, temperature=0.7, extra_body=IDS)
        assert found.choices[0].token_ids == [21, 100, 101]
        plain.stop()
        with pytest.raises(openai.APIStatusError, match=re.escape(plain.url)):
            client.completions.create(model=MODEL, prompt=[20], max_tokens=3, temperature=0.7)
        assert completion(address, [20], max_tokens=3).usage.completion_tokens == 3


def test_a_request_that_the_engine_refuses_fails_alone(address):
    with client_of(address) as client, pytest.raises(openai.APIStatusError, match="no nines") as caught:
        client.completions.create(model=MODEL, prompt=[9], max_tokens=3, temperature=0)
    assert caught.value.status_code == 502
    assert completion(address, [20], max_tokens=3).usage.completion_tokens == 3
    assert httpx.get(f"{address}/health").status_code == 200


def test_an_engine_that_dies_fails_its_requests(tokenizer):
    with stand_in("crash-later") as engine, gateway(tokenizer, engine) as address, client_of(address) as client:
        with pytest.raises(openai.APIStatusError, match="has failed") as caught:
            client.completions.create(model=MODEL, prompt=[20], max_tokens=3, temperature=0)
        assert caught.value.status_code == 502


def test_the_metrics_are_this_servers(address):
    completion(address, [20], max_tokens=3)
    metrics = httpx.get(f"{address}/metrics").text
    assert re.search(r"^serve_generated_tokens_total 3.0$", metrics, re.MULTILINE)
