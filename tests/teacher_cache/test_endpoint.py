"""Answers through a real client and a fake endpoint: whatever it does, every prompt is accounted for."""

import json
import logging
import os
import pickle
import re
import signal
import subprocess
import sys
import time

import pytest

from pipeline.engine.request import Completion
from pipeline.errors import PipelineError
from pipeline.prompts.chat_format import stop_token_ids
from pipeline.prompts.harmony import render_completion
from pipeline.prompts.messages import Message
from pipeline.prompts.sources import prompt_of
from pipeline.prompts.tools import Tool, ToolCall
from pipeline.teacher_cache.answer import AnsweredPrompt, FailedPrompt
from pipeline.teacher_cache.answer_reader import AnswerReader
from pipeline.teacher_cache.endpoint import Endpoint, EndpointClient
from pipeline.teacher_cache.endpoint_replies import EndpointApi, RequestTemplate
from pipeline.teacher_cache.origin import AnswerOrigin
from pipeline.teacher_cache.render import RenderedPrompt
from tests.support.compiled import QUICKLY
from tests.support.corpus_tokenizer import corpus_tokenizer
from tests.support.fake_endpoint import Fake, Reply, endpoint
from tests.support.fake_engine import FakeEngine
from tests.support.paths import ROOT
from tests.support.serving import serving

KEY = "sk-very-secret-0123456789"
NUM_ROWS = 24


@pytest.fixture(scope="module")
def tokenizer():
    return corpus_tokenizer(300)


@pytest.fixture(scope="module")
def rows():
    return [
        RenderedPrompt(prompt_of([Message("user", f"Count to {index}.")], "low"), (1, 2, index), None)
        for index in range(NUM_ROWS)
    ]


def answer_to(body):
    return f"I count: {body['messages'][-1]['content']}"


def good(_path, body, _count):
    message = {"role": "assistant", "content": answer_to(body), "reasoning_content": "Easy."}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return Reply({"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 9}})


def asked_about(body, *numbers):
    return body["messages"][-1]["content"] in [f"Count to {number}." for number in numbers]


def endpoint_client(tokenizer, fake, log_path, longest=80, **values):
    options = {"url": fake.url, "key": KEY, "concurrency": 4, "timeout_seconds": 20.0, "retries": 2}
    origin = AnswerOrigin(endpoint="tiny at 127.0.0.1")
    template = RequestTemplate(
        api=EndpointApi.chat, model="tiny", origin=origin, max_new_tokens=longest, has_efforts=True
    )
    reader = AnswerReader(tokenizer, stop_token_ids(tokenizer), longest)
    return EndpointClient(Endpoint(**(options | values)), template, reader, log_path)


def outcomes(found, rows):
    """Answers of rows, by fetching; and the ids of those that were reported as finished."""
    finished = []
    found.fetch(rows)
    return found.answer(rows, lambda completion: finished.append(completion.request_id)), finished


def require_answered(tokenizer, row, outcome):
    wanted = render_completion(tokenizer, "Easy.", f"I count: {row.prompt.messages[-1].content}")
    assert outcome == AnsweredPrompt(row.prompt, (*row.token_ids, *wanted), len(row.token_ids), "stop")


def test_every_row_gets_its_own_answer_in_order_several_at_once(tokenizer, rows, tmp_path):
    def slow(path, body, count):
        time.sleep(0.02)
        return good(path, body, count)

    with endpoint(slow) as fake:
        found, finished = outcomes(endpoint_client(tokenizer, fake, tmp_path / "replies.jsonl"), rows)
    for row, outcome in zip(rows, found, strict=True):
        require_answered(tokenizer, row, outcome)
    assert finished == [row.prompt.prompt_id for row in rows]
    assert 2 <= fake.most_at_once <= 4
    assert set(fake.keys) == {f"Bearer {KEY}"}
    assert len(fake.bodies) == NUM_ROWS


def test_every_answer_is_reported_as_a_completion_without_draft_rounds(tokenizer, rows, tmp_path):
    completions = []
    with endpoint(good) as fake:
        client = endpoint_client(tokenizer, fake, tmp_path / "replies.jsonl")
        client.fetch(rows[:1])
        (answered,) = client.answer(rows[:1], completions.append)
    generated = answered.token_ids[answered.prompt_tokens :]
    wanted = Completion(
        request_id=rows[0].prompt.prompt_id, token_ids=generated, finish_reason="stop", accepted_per_round=()
    )
    assert completions == [wanted]


def test_what_was_answered_is_not_asked_again_unless_the_question_changes(tokenizer, rows, tmp_path):
    with endpoint(good) as fake:
        first, _ = outcomes(endpoint_client(tokenizer, fake, tmp_path / "replies.jsonl"), rows)
        again, _ = outcomes(endpoint_client(tokenizer, fake, tmp_path / "replies.jsonl"), rows)
        assert first == again
        assert len(fake.bodies) == NUM_ROWS
        other = [RenderedPrompt(prompt_of(rows[0].prompt.messages, "high"), rows[0].token_ids, None)]
        outcomes(endpoint_client(tokenizer, fake, tmp_path / "replies.jsonl"), other)
        assert len(fake.bodies) == NUM_ROWS + 1


TROUBLE = {
    "429 with Retry-After": lambda: Reply({"error": {"message": "slow down"}}, 429, {"Retry-After": "0.2"}),
    "500": lambda: Reply(b"oops", 500),
    "503": lambda: Reply({"error": {"message": "loading"}}, 503),
    "hangs": lambda: Reply(hangs=True),
}


@pytest.mark.parametrize("trouble", TROUBLE.values(), ids=TROUBLE.keys())
def test_passing_trouble_is_passed_over(tokenizer, rows, tmp_path, trouble):
    def script(path, body, count):
        return trouble() if count == 0 and asked_about(body, 3) else good(path, body, count)

    with endpoint(script) as fake:
        started = time.monotonic()
        found, _ = outcomes(endpoint_client(tokenizer, fake, tmp_path / "replies.jsonl", timeout_seconds=1.5), rows[:5])
        seconds = time.monotonic() - started
    assert all(isinstance(outcome, AnsweredPrompt) for outcome in found)
    assert len(fake.bodies) == 6
    assert seconds > 0.15


LASTING = {
    "500": (Reply(b"oops", 500), "HTTP 500: oops"),
    "429": (Reply({"error": {"message": f"quota of {KEY}"}}, 429, {"Retry-After": "0.1"}), r"HTTP 429: .*\(key\)"),
    "too long": (Reply({"error": {"message": "maximum context length is 8"}}, 400), "HTTP 400: .*maximum context"),
    "hangs": (Reply(hangs=True), r"no answer within 1\.5 s"),
    "no JSON": (Reply(b'{"choices": ['), "the reply is no JSON"),
    "no UTF-8": (Reply(b'{"choices": "\xff"}'), "the reply is no JSON"),
    "nothing": (Reply(b""), "the reply is no JSON"),
    "HTML": (Reply(b"<html>", headers={"Content-Type": "text/html"}), "the reply has no choices: '<html>'"),
    "an error for a reply": (Reply({"error": "busy"}), "the reply has no choices"),
    "filtered": (Reply({"choices": [{"finish_reason": "content_filter"}]}), "ended with 'content_filter'"),
}


@pytest.mark.parametrize(("reply", "reason"), LASTING.values(), ids=LASTING.keys())
def test_a_prompt_that_fails_is_told_and_the_others_are_answered(
    tokenizer, rows, tmp_path, reply, reason, caplog, capfd
):
    def script(path, body, count):
        return reply if asked_about(body, 7) else good(path, body, count)

    log_path = tmp_path / "replies.jsonl"
    with endpoint(script) as fake, caplog.at_level(logging.DEBUG):
        found, finished = outcomes(endpoint_client(tokenizer, fake, log_path, timeout_seconds=1.5, retries=1), rows)
    failed = [outcome for outcome in found if isinstance(outcome, FailedPrompt)]
    assert [outcome.prompt for outcome in failed] == [rows[7].prompt]
    assert re.search(reason, failed[0].reason)
    assert len(found) == NUM_ROWS == len(finished) + 1
    assert "1 of 24 prompts got no answer" in caplog.text
    assert sum("failed" in json.loads(line) for line in log_path.read_text().splitlines()) == 1
    output = capfd.readouterr()
    for text in (log_path.read_text(), caplog.text, output.out, output.err):
        assert KEY not in text


REFUSED = {
    "no key": (401, "Incorrect API key provided: {}", "api_key_env"),
    "not allowed": (403, "key {} may not use tiny", "use a key that may use this model"),
    "wrong model": (404, "The model `tiny` does not exist", r"teacher_cache\.openai\.model"),
}


@pytest.mark.parametrize(("status", "message", "mend"), REFUSED.values(), ids=REFUSED.keys())
def test_what_every_request_will_meet_ends_the_run_at_once(tokenizer, rows, tmp_path, status, message, mend):
    reply = Reply({"error": {"message": message.format(KEY)}}, status)
    with endpoint(lambda *_: reply) as fake, pytest.raises(PipelineError, match=mend) as caught:
        endpoint_client(tokenizer, fake, tmp_path / "replies.jsonl").fetch(rows)
    assert f"tiny at 127.0.0.1 answers HTTP {status}" in str(caught.value)
    assert KEY not in str(caught.value)
    assert len(fake.bodies) <= 4


def test_nobody_there_is_one_error(tokenizer, rows, tmp_path):
    with endpoint(good) as fake:
        pass
    with pytest.raises(PipelineError, match=r"failed [34] of [34] prompts, at most 10% may fail") as caught:
        endpoint_client(tokenizer, fake, tmp_path / "replies.jsonl", retries=0).fetch(rows)
    assert "no connection" in str(caught.value)


def test_more_failures_than_a_tenth_are_one_error_and_nothing_is_lost(tokenizer, rows, tmp_path):
    def script(path, body, count):
        if asked_about(body, 20, 21):
            return Reply(b"oops", 500)
        return Reply({"error": {"message": "no"}}, 400) if asked_about(body, 22) else good(path, body, count)

    log_path = tmp_path / "replies.jsonl"
    with endpoint(script) as fake, pytest.raises(PipelineError) as caught:
        endpoint_client(tokenizer, fake, log_path, retries=0).fetch(rows)
    message = str(caught.value)
    assert "tiny at 127.0.0.1 failed 3 of" in message
    assert "at most 10% may fail; the answers that came are kept: run the same command to go on" in message
    assert "\n  2 prompts: HTTP 500" in message
    assert "\n  1 prompts: HTTP 400" in message
    lines = [json.loads(line) for line in log_path.read_text().splitlines()]
    assert len(lines) >= len(fake.bodies) - 3  # the other workers' requests were on their way
    assert sum("kept" in line for line in lines) == len(lines) - 3


def test_answers_that_came_before_an_error_are_there_when_the_endpoint_is_mended(tokenizer, rows, tmp_path):
    broken = [True]

    def script(path, body, count):
        return Reply(b"oops", 500) if broken and asked_about(body, 20, 21, 22) else good(path, body, count)

    with endpoint(script) as fake:
        with pytest.raises(PipelineError, match="may fail"):
            endpoint_client(tokenizer, fake, tmp_path / "replies.jsonl", retries=0, concurrency=1).fetch(rows)
        assert len(fake.bodies) == 23  # the third failure is one too many
        broken.clear()
        found, _ = outcomes(endpoint_client(tokenizer, fake, tmp_path / "replies.jsonl"), rows)
        assert len(fake.bodies) == 23 + 4
    for row, outcome in zip(rows, found, strict=True):
        require_answered(tokenizer, row, outcome)


def test_a_prompt_that_fails_again_is_asked_again_and_does_not_end_the_run(tokenizer, rows, tmp_path):
    broken = [True]

    def script(path, body, count):
        return Reply(b"no", 400) if broken and asked_about(body, 7) else good(path, body, count)

    with endpoint(script) as fake:
        for _ in range(2):
            found, _ = outcomes(endpoint_client(tokenizer, fake, tmp_path / "replies.jsonl"), rows)
            assert found[7] == FailedPrompt(rows[7].prompt, "HTTP 400: no")
            assert sum(isinstance(outcome, FailedPrompt) for outcome in found) == 1
        assert len(fake.bodies) == NUM_ROWS + 1
        broken.clear()
        found, _ = outcomes(endpoint_client(tokenizer, fake, tmp_path / "replies.jsonl"), rows)
        assert len(fake.bodies) == NUM_ROWS + 2
    require_answered(tokenizer, rows[7], found[7])


def test_another_prompt_than_ours_is_told(tokenizer, rows, tmp_path, caplog):
    def script(path, body, count):
        reply = good(path, body, count)
        if asked_about(body, 2, 5):
            reply.body["usage"]["prompt_tokens"] = 8
        if asked_about(body, 6):
            reply.body["prompt_token_ids"] = [1, 2, 7]
        if asked_about(body, 8):
            reply.body["prompt_token_ids"] = [1, 2, 8]
        return reply

    with endpoint(script) as fake:
        outcomes(endpoint_client(tokenizer, fake, tmp_path / "replies.jsonl"), rows)
    assert "tiny at 127.0.0.1 read 3 of 24 prompts as other tokens than they have here" in caplog.text


def test_the_text_of_our_own_servers_chat_becomes_the_tokens_that_its_engine_gave(tokenizer, rows, tmp_path):
    answer = render_completion(tokenizer, "Easy: one, two.", "1 2 🎉")
    call = render_completion(tokenizer, "Look.", tool_calls=[ToolCall("lookup", '{"q": [1, "é"]}')])
    with_tools = prompt_of([Message("user", "Look it up.")], "low", [Tool("lookup", "Finds")])
    asked = [*rows[:3], RenderedPrompt(with_tools, (5, 6), None)]

    def script(request):
        token_ids = call if "# Tools" in tokenizer.decode(request.prompt_ids) else answer
        return token_ids[: request.max_new_tokens]

    for longest, reason in ((80, "stop"), (9, "length")):
        engine = FakeEngine(script, stop_token_ids(tokenizer), max_length=400)
        with serving(engine, tokenizer) as address:
            fake = Fake(f"{address}/v1")
            found, _ = outcomes(endpoint_client(tokenizer, fake, tmp_path / "replies.jsonl", longest=longest), asked)
        for row, outcome in zip(asked[:3], found, strict=False):
            wanted = tuple(answer[:longest])
            assert outcome == AnsweredPrompt(row.prompt, row.token_ids + wanted, len(row.token_ids), reason)
        generated = found[3].token_ids[2:]
        assert generated == tuple(
            call[: len(generated)]
        )  # what was cut off right behind the analysis lacks the end of that
        assert len(generated) == len(call) if reason == "stop" else len(generated) in (8, 9)


FETCHING = """
import pickle, sys
found, rows = pickle.load(open(sys.argv[1], "rb"))
found.fetch(rows)
"""


def test_kill_9_loses_at_most_what_was_on_its_way(tokenizer, rows, tmp_path):
    held = [True]

    def script(path, body, count):
        return Reply(hangs=True) if held and asked_about(body, *range(12, NUM_ROWS)) else good(path, body, count)

    log_path = tmp_path / "replies.jsonl"
    with endpoint(script) as fake:
        pickled = tmp_path / "client"
        pickled.write_bytes(pickle.dumps((endpoint_client(tokenizer, fake, log_path, concurrency=4), rows)))
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | QUICKLY
        process = subprocess.Popen([sys.executable, "-c", FETCHING, str(pickled)], env=environment)
        deadline = time.monotonic() + 120
        while len(fake.bodies) < 16:  # twelve answers, four more on their way
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        with open(log_path, "ab") as file:
            file.write(b'{"key":"torn')
        held.clear()
        found, _ = outcomes(endpoint_client(tokenizer, fake, log_path), rows)
        assert len(fake.bodies) == 16 + 12
    for row, outcome in zip(rows, found, strict=True):
        require_answered(tokenizer, row, outcome)
