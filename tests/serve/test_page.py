"""The page at `/`, what a stream shows of rounds, and the target alone beside its draft."""

import base64
import hashlib
import json
import re

import httpx
import pytest

from pipeline.serve.page import page
from tests.serve.test_api import ANALYSIS, FINAL, TOOL, USER, create_engine
from tests.support.serving import MODEL, client_of, serving


@pytest.fixture
def engine(tokenizer):
    return create_engine(tokenizer, max_length=400)


@pytest.fixture
def plain(tokenizer):
    return create_engine(tokenizer, max_length=400, block_size=None)


@pytest.fixture
def address(engine, plain, tokenizer):
    with serving(engine, tokenizer, plain=plain) as address:
        yield address


def test_the_page_names_its_script_and_style_and_loads_nothing(address):
    reply = httpx.get(address)
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/html")
    policy = reply.headers["content-security-policy"]
    for element in ("script", "style"):
        (content,) = re.findall(rf"<{element}>(.*?)</{element}>", reply.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{element}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "http://" not in reply.text.replace("http://127.0.0.1", "")
    assert "https://" not in reply.text
    assert httpx.head(address).status_code == 200


@pytest.mark.parametrize("compares", [True, False])
def test_the_page_knows_whether_the_server_compares(compares):
    assert f'data-compare="{str(compares).lower()}"' in bytes(page(compares=compares).body).decode()


def test_the_page_needs_no_key_and_what_it_asks_does(engine, plain, tokenizer):
    with serving(engine, tokenizer, plain=plain, keys=["secret"]) as address:
        assert httpx.get(address).status_code == 200
        for path in ("/v1/models", "/plain/v1/models", "/plain/health", "/plain/"):
            assert httpx.get(address + path).status_code == 401
        allowed = httpx.get(f"{address}/plain/v1/models", headers={"Authorization": "Bearer secret"})
        assert allowed.status_code == 200


def rounds_of(address, **body):
    sent = {"model": MODEL, "messages": [USER], "stream": True, "return_rounds": True} | body
    text = httpx.post(f"{address}/v1/chat/completions", json=sent).text
    chunks = [
        json.loads(event.removeprefix("data: ")) for event in text.split("\n\n") if event[6:] not in ("", "[DONE]")
    ]
    return chunks, [choice["round"] for chunk in chunks for choice in chunk["choices"] if "round" in choice]


def texts_of(rounds):
    found = {}
    for piece in (piece for one in rounds for pieces in one["tokens"] for piece in pieces):
        found[piece["channel"]] = found.get(piece["channel"], "") + piece["text"]
    return found


def test_a_stream_shows_the_tokens_of_each_round(address):
    chunks, rounds = rounds_of(address)
    assert texts_of(rounds) == {"analysis": ANALYSIS, "final": FINAL}
    first, *others = rounds
    assert (first["num_accepted"], len(first["tokens"])) == (None, 1)
    assert all(one["num_accepted"] == len(one["tokens"]) - 1 for one in others)
    assert {one["num_drafted"] for one in others} == {7}
    content = "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])
    assert content == FINAL


def test_rounds_end_where_a_stop_string_does(address):
    _, rounds = rounds_of(address, stop=FINAL[3:6])
    assert texts_of(rounds)["final"] == FINAL[:3]


def test_a_call_is_shown_as_one(address):
    _, rounds = rounds_of(address, tools=[TOOL])
    assert "call" in texts_of(rounds)


def test_a_stream_shows_no_rounds_that_nobody_asked_for(address):
    _, rounds = rounds_of(address, return_rounds=False)
    assert rounds == []
    body = {"model": MODEL, "messages": [USER], "return_rounds": True}
    refused = httpx.post(f"{address}/v1/chat/completions", json=body)
    assert refused.json()["error"]["param"] == "return_rounds"


def test_the_target_alone_answers_beside_its_draft(address, engine, plain):
    _, rounds = rounds_of(f"{address}/plain")
    assert {one["num_accepted"] for one in rounds} == {None}
    assert texts_of(rounds)["final"] == FINAL
    assert (engine.most_running, plain.most_running) == (0, 1)
    with client_of(f"{address}/plain") as client:
        assert client.models.list().data[0].id == MODEL
    assert "serve_generated_tokens_total" in httpx.get(f"{address}/plain/metrics").text
    assert httpx.get(f"{address}/plain/v1/nothing").status_code == 404


def test_without_a_second_engine_there_is_no_plain_arm(engine, tokenizer):
    with serving(engine, tokenizer) as address:
        assert httpx.get(f"{address}/plain/v1/models").status_code == 404
