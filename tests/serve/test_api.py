"""The HTTP side, through OpenAI's own client and a real server; the engine says what a script says."""

import contextlib
import copy
import datetime
import json
import socket
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pipeline.errors import PipelineError
from pipeline.prompts.chat_format import render_prompt, stop_token_ids
from pipeline.prompts.harmony import render_completion
from pipeline.prompts.text_length import longest_token
from pipeline.prompts.tools import ToolCall
from pipeline.serve import server
from tests.support.chatml import chatml_tokenizer
from tests.support.fake_engine import FakeEngine
from tests.support.serving import MODEL, client_of, serving

ANALYSIS, FINAL = "17 + 25: naïve, 東京.", "It is 42 🎉 indeed."
USER = {"role": "user", "content": "What is 17 + 25?"}
ARGUMENTS = '{"a": 17, "b": [25, "é 東"]}'
TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": ARGUMENTS}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "42"}


def create_engine(tokenizer, **options):
    answer = render_completion(tokenizer, ANALYSIS, FINAL)
    call = render_completion(tokenizer, ANALYSIS, tool_calls=[ToolCall("add", ARGUMENTS)])
    text = tokenizer.encode("the text é goes on and on", add_special_tokens=False)
    stops = stop_token_ids(tokenizer)
    chat_start = tokenizer.convert_tokens_to_ids("<|start|>")

    def script(request):
        if request.prompt_ids[0] == chat_start:
            offered, returned = (
                text in tokenizer.decode(request.prompt_ids) for text in ("# Tools", "functions.add to=")
            )
            return call if offered and not returned else answer
        if request.prompt_ids == (7, 7):  # endless
            return [text[0]] * request.max_new_tokens
        if request.prompt_ids == (8, 8):
            return [*text, *[text[0]] * request.max_new_tokens]
        return [*text, stops[0]]

    return FakeEngine(script, stops, **options)


@pytest.fixture
def engine(tokenizer):
    return create_engine(tokenizer)


@pytest.fixture
def address(engine, tokenizer):
    with serving(engine, tokenizer) as address:
        yield address


@pytest.fixture
def client(address):
    with client_of(address) as client:
        yield client


@pytest.fixture
def roomy_engine(tokenizer):
    """With room for tools."""
    return create_engine(tokenizer, max_length=400)


@pytest.fixture
def roomy_client(roomy_engine, tokenizer):
    with (
        serving(roomy_engine, tokenizer) as address,
        client_of(address) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def idle_engine(tokenizer):
    return create_engine(tokenizer)


@pytest.fixture(scope="module")
def shared_address(idle_engine, tokenizer):
    """One server for the many requests that never reach the engine, or leave nothing in it."""
    with serving(idle_engine, tokenizer) as address:
        yield address


@pytest.fixture(scope="module")
def shared_http(shared_address):
    """One connection to it."""
    with httpx.Client(base_url=shared_address) as client:
        yield client


def until(condition, seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def metric(address: str, name: str) -> float:
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    return next(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name} "))


def test_a_completion_carries_text_reason_and_exact_usage(client, tokenizer):
    reply = client.completions.create(model=MODEL, prompt="Go", max_tokens=100)
    num_tokens = len(tokenizer.encode("the text é goes on and on", add_special_tokens=False)) + 1
    assert reply.choices[0].text == "the text é goes on and on"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.prompt_tokens == len(tokenizer.encode("Go", add_special_tokens=False))
    assert reply.usage.completion_tokens == num_tokens
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + num_tokens


def test_a_chat_reply_carries_its_tokens_when_they_are_wanted(client, tokenizer):
    options = {"model": MODEL, "messages": [USER], "max_tokens": 90}
    bare = client.chat.completions.create(**options).model_dump()
    detailed = client.chat.completions.create(**options, extra_body={"return_token_ids": True}).model_dump()
    assert detailed["prompt_token_ids"] == render_prompt(tokenizer, [USER], "low")
    assert detailed["choices"][0]["token_ids"] == render_completion(tokenizer, ANALYSIS, FINAL)
    assert detailed["choices"][0]["message"] == bare["choices"][0]["message"]
    assert "token_ids" not in bare["choices"][0]
    with pytest.raises(openai.BadRequestError, match="return_token_ids is served without stream alone"):
        client.chat.completions.create(**options, stream=True, extra_body={"return_token_ids": True})


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
def test_max_tokens_is_exact(client, count):
    reply = client.completions.create(
        model=MODEL, prompt=[7, 7], max_tokens=count, extra_body={"return_token_ids": True}
    )
    assert reply.usage.completion_tokens == count == len(reply.choices[0].token_ids)
    assert reply.choices[0].finish_reason == "length"


def test_a_completion_without_max_tokens_has_sixteen(client):
    assert client.completions.create(model=MODEL, prompt=[7, 7]).usage.completion_tokens == 16


def test_usage_reports_the_drafted_tokens_accepted_and_rejected(client, engine):
    details = client.completions.create(model=MODEL, prompt=[7, 7], max_tokens=8).usage.completion_tokens_details
    # one token by prefill, then rounds of 3, 3 and 1 tokens: 2, 2 and 0 of 7 drafts accepted
    assert details.accepted_prediction_tokens == 4 == engine.acceptance.num_accepted
    assert details.rejected_prediction_tokens == 3 * 7 - 4


@pytest.mark.parametrize(
    "prompt", ["Go", ["Go", "Stay"], [5, 6], [[5, 6], [7, 8, 9]]], ids=["text", "texts", "tokens", "lists of tokens"]
)
def test_prompts_are_texts_or_tokens_one_or_many(client, prompt):
    reply = client.completions.create(model=MODEL, prompt=prompt, max_tokens=100)
    many = isinstance(prompt, list) and not isinstance(prompt[0], int)
    assert [choice.index for choice in reply.choices] == list(range(len(prompt) if many else 1))
    assert {choice.text for choice in reply.choices} == {"the text é goes on and on"}


def test_a_streamed_completion_adds_up_to_the_whole(client):
    whole = client.completions.create(model=MODEL, prompt=["Go", "Stay"], max_tokens=100)
    texts, reasons, usage = ["", ""], [None, None], None
    for chunk in client.completions.create(
        model=MODEL, prompt=["Go", "Stay"], max_tokens=100, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            assert "\ufffd" not in choice.text
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == ["stop", "stop"]
    assert usage == whole.usage


def test_a_chat_reply_has_final_as_content_and_analysis_apart(client, tokenizer):
    reply = client.chat.completions.create(model=MODEL, messages=[USER])
    message = reply.choices[0].message
    assert (message.content, message.reasoning_content, message.reasoning) == (FINAL, ANALYSIS, ANALYSIS)
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.completion_tokens == len(render_completion(tokenizer, ANALYSIS, FINAL))


def test_a_chat_reply_cut_by_its_limit_says_so(client):
    reply = client.chat.completions.create(model=MODEL, messages=[USER], max_completion_tokens=6)
    assert reply.choices[0].finish_reason == "length"
    assert reply.choices[0].message.content == ""
    assert ANALYSIS.startswith(reply.choices[0].message.reasoning_content)


def test_a_streamed_chat_comes_by_channel_and_adds_up(client):
    texts, order, reasons, roles = {"content": "", "reasoning_content": ""}, [], [], []
    for chunk in client.chat.completions.create(model=MODEL, messages=[USER], stream=True):
        delta = chunk.choices[0].delta
        roles.append(delta.role)
        reasons.append(chunk.choices[0].finish_reason)
        assert getattr(delta, "reasoning", None) == getattr(delta, "reasoning_content", None)
        for name in texts:
            piece = getattr(delta, name, None)
            if piece:
                texts[name] += piece
                order.append(name)
    assert texts == {"content": FINAL, "reasoning_content": ANALYSIS}
    assert order == sorted(order, reverse=True)  # all of the analysis, then all of the content
    assert roles[0] == "assistant"
    assert set(roles[1:]) == {None}
    assert reasons[-1] == "stop"
    assert set(reasons[:-1]) == {None}


@pytest.mark.parametrize("effort", [None, "low", "medium", "high"])
def test_the_prompt_is_rendered_with_the_effort_asked_for(client, engine, tokenizer, effort):
    seen = []
    script = engine.script
    engine.script = lambda request: seen.append(request.prompt_ids) or script(request)
    options = {} if effort is None else {"reasoning_effort": effort}
    client.chat.completions.create(model=MODEL, messages=[USER], **options)
    assert seen == [tuple(render_prompt(tokenizer, [USER], effort or "low"))]


def test_an_earlier_answer_can_be_sent_back_as_the_client_holds_it(client):
    first = client.chat.completions.create(model=MODEL, messages=[USER]).choices[0].message
    parts = {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "text", "text": "1 + 1?"}]}
    reply = client.chat.completions.create(model=MODEL, messages=[USER, first.model_dump(), parts], max_tokens=8)
    assert reply.choices[0].finish_reason == "length"


def seen_prompts(engine):
    """What the engine is asked from now on."""
    seen, script = [], engine.script
    engine.script = lambda request: seen.append(request.prompt_ids) or script(request)
    return seen


def test_a_call_of_a_tool_comes_apart_and_its_result_goes_back_as_the_client_holds_it(
    roomy_client, roomy_engine, tokenizer
):
    seen = seen_prompts(roomy_engine)
    first = roomy_client.chat.completions.create(model=MODEL, messages=[USER], tools=[TOOL], tool_choice="auto")
    (choice,) = first.choices
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    assert (call.type, call.function.name, call.function.arguments) == ("function", "add", ARGUMENTS)
    assert (choice.message.content, choice.message.reasoning_content) == (None, ANALYSIS)

    result = {"role": "tool", "tool_call_id": call.id, "content": "42"}
    turns = [USER, choice.message.model_dump(), result]
    reply = roomy_client.chat.completions.create(model=MODEL, messages=turns, tools=[TOOL])
    assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == (FINAL, "stop")
    assert reply.choices[0].message.tool_calls is None
    history = [USER, CALLING | {"thinking": ANALYSIS}, RESULT]
    assert seen == [tuple(render_prompt(tokenizer, asked, "low", tools=[TOOL])) for asked in ([USER], history)]


def test_a_streamed_call_adds_up(roomy_client):
    names, arguments, ids, reasons, thoughts = [], "", set(), [], ""
    for chunk in roomy_client.chat.completions.create(model=MODEL, messages=[USER], tools=[TOOL], stream=True):
        delta = chunk.choices[0].delta
        reasons.append(chunk.choices[0].finish_reason)
        thoughts += getattr(delta, "reasoning_content", None) or ""
        assert not delta.content
        for call in delta.tool_calls or ():
            assert call.index == 0
            names += [call.function.name] if call.function.name else []
            ids |= {call.id} if call.id else set()
            arguments += call.function.arguments
    assert (names, arguments, thoughts, len(ids)) == (["add"], ARGUMENTS, ANALYSIS, 1)
    assert reasons[-1] == "tool_calls"
    assert set(reasons[:-1]) == {None}


def test_a_call_cut_by_its_limit_says_so(roomy_client, tokenizer):
    length = len(render_completion(tokenizer, ANALYSIS, tool_calls=[ToolCall("add", ARGUMENTS)]))
    reply = roomy_client.chat.completions.create(model=MODEL, messages=[USER], tools=[TOOL], max_tokens=length - 4)
    assert reply.choices[0].finish_reason == "length"
    found = reply.choices[0].message.tool_calls[0].function.arguments
    assert ARGUMENTS.startswith(found) != (found == ARGUMENTS)


def test_tools_that_are_not_to_be_called_are_not_offered(roomy_client, roomy_engine, tokenizer):
    seen = seen_prompts(roomy_engine)
    roomy_client.chat.completions.create(model=MODEL, messages=[USER], tools=[TOOL], tool_choice="none")
    assert seen == [tuple(render_prompt(tokenizer, [USER], "low"))]


@pytest.mark.parametrize("date", ["2025-08-05", None], ids=["pinned", "today"])
def test_the_day_in_a_prompt_is_the_servers(tokenizer, date):
    dated = copy.deepcopy(tokenizer)
    dated.chat_template = "{{ strftime_now('%Y-%m-%d') }}" + tokenizer.chat_template
    engine = create_engine(dated)
    seen = seen_prompts(engine)
    with (
        serving(engine, dated, date=date) as address,
        client_of(address) as client,
    ):
        client.chat.completions.create(model=MODEL, messages=[USER], max_tokens=4)
    day = dated.decode(seen[0]).partition("<|start|>")[0]
    today = datetime.date.today()
    assert day in ([date] if date else [today.isoformat(), (today - datetime.timedelta(days=1)).isoformat()])


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_before_it_and_the_generation_in_the_engine(client, engine, tokenizer, stream):
    engine.step_seconds = 0.01
    reply = client.completions.create(
        model=MODEL, prompt=[8, 8], max_tokens=150, stop=["goes on", "never"], stream=stream,
        extra_body={"return_token_ids": True},
    )  # fmt: skip
    choices = [chunk.choices[0] for chunk in reply] if stream else reply.choices
    token_ids = [token_id for choice in choices for token_id in choice.token_ids]
    assert "".join(choice.text for choice in choices) == "the text é "
    assert choices[-1].finish_reason == "stop"
    assert tokenizer.decode(token_ids).startswith("the text é goes on")
    assert not tokenizer.decode(token_ids[:-1]).startswith("the text é goes on")
    assert until(lambda: not engine.has_work)
    assert len(engine.cancelled) == 1


def test_a_stop_string_in_a_chat_is_looked_for_in_the_final_alone(client):
    reply = client.chat.completions.create(model=MODEL, messages=[USER], stop=["25", " indeed"])
    assert reply.choices[0].message.reasoning_content == ANALYSIS
    assert reply.choices[0].message.content == "It is 42 🎉"
    assert reply.choices[0].finish_reason == "stop"
    details = reply.usage.completion_tokens_details
    assert details.accepted_prediction_tokens < reply.usage.completion_tokens


BODIES = [json.loads(line) for line in (Path(__file__).parent / "request_bodies.jsonl").read_text().splitlines()]


def body_of(case):
    """What a case of request_bodies.jsonl sends: a `body` as it is, or the `change` of one that is served."""
    first = {"prompt": "Go"} if case["path"] == "completions" else {"messages": [USER]}
    return case.get("body") or json.dumps({"model": MODEL, **first, **case["change"]})


@pytest.mark.parametrize("case", BODIES, ids=lambda case: ascii(case.get("body", case.get("change")))[:60])
def test_an_odd_body_has_the_recorded_answer(shared_http, idle_engine, case):
    reply = shared_http.post(f"/v1/{case['path']}", content=body_of(case))
    assert reply.status_code == case["status"]
    if case["status"] != 200:
        wanted = {key: case[key] for key in ("message", "param", "code")}
        assert reply.json() == {"error": {"type": "invalid_request_error", **wanted}}
        assert not idle_engine.has_work


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0, "top_p": 1, "n": 1, "seed": 5, "user": "me", "logit_bias": {}, "presence_penalty": 0},
        {"temperature": None, "stop": None, "logprobs": None, "max_tokens": None, "stream": None},
    ],
    ids=["neutral", "null"],
)
def test_options_that_ask_for_nothing_are_taken(shared_address, options):
    body = {"model": MODEL, "prompt": "Go", **options}
    assert httpx.post(f"{shared_address}/v1/completions", json=body).status_code == 200


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b'"x"', b"\xff\xfe", b"[" * 50_000],
    ids=["empty", "cut", "list", "text", "bytes", "deep"],
)
def test_a_malformed_body_is_a_bad_request(shared_address, content):
    reply = httpx.post(f"{shared_address}/v1/chat/completions", content=content)
    assert reply.status_code == 400
    assert reply.json()["error"]["type"] == "invalid_request_error"


def test_an_unknown_model_is_not_found_and_the_served_one_named(client):
    with pytest.raises(openai.NotFoundError, match="served: 'tiny'") as caught:
        client.completions.create(model="gpt-5", prompt="Go")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")


def test_a_request_that_does_not_fit_the_context_names_the_counts(client):
    with pytest.raises(openai.BadRequestError, match=r"150 tokens and 51 more .* 201 in all.* 200 tokens") as caught:
        client.completions.create(model=MODEL, prompt=[5] * 150, max_tokens=51)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="at least one more") as caught:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "12" * 200}])
    assert caught.value.code == "context_length_exceeded"


def test_a_text_that_cannot_fit_the_context_is_refused_before_it_is_encoded(client, tokenizer):
    longest = longest_token(tokenizer)
    text, wanted = "x" * (200 * longest + 1), "at least 201 tokens; this server's context is 200 tokens"
    with pytest.raises(openai.BadRequestError, match=wanted) as caught:
        client.completions.create(model=MODEL, prompt=text)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "prompt"
    with pytest.raises(openai.BadRequestError, match="at least 2[0-9]+ tokens; this server's") as caught:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": text}])
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="at least 2[0-9]+ tokens; this server's") as caught:
        client.responses.create(model=MODEL, input=text + "<|end|>")
    assert caught.value.code == "context_length_exceeded"


def test_unknown_paths_and_methods_answer_in_the_same_shape(address):
    for reply in (httpx.get(f"{address}/v2"), httpx.get(f"{address}/v1/completions")):
        assert reply.status_code in (404, 405)
        assert "served: POST /v1/completions" in reply.json()["error"]["message"]


def test_models_and_health(client, address):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    assert httpx.get(f"{address}/health").status_code == 200


def test_concurrent_requests_share_the_engine(client, engine):
    engine.step_seconds = 0.02
    texts = []

    def ask():
        texts.append(client.chat.completions.create(model=MODEL, messages=[USER]).choices[0].message.content)

    threads = [threading.Thread(target=ask) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [FINAL] * 10
    assert engine.most_running == engine.config.num_slots


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request_in_the_engine(address, engine, stream):
    engine.step_seconds = 0.2  # half a minute for the whole answer
    body = {"model": MODEL, "prompt": [7, 7], "max_tokens": 150, "stream": stream}
    with socket.create_connection(("127.0.0.1", int(address.rsplit(":", 1)[1]))) as connection:
        text = json.dumps(body)
        connection.sendall(
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode()
        )
        assert until(lambda: engine.num_running == 1)
    assert until(lambda: len(engine.cancelled) == 1 and not engine.has_work, 10.0)
    assert until(lambda: metric(address, 'serve_requests_total{outcome="cancelled"}') == 1)


def test_metrics_show_the_engines_acceptance(client, address, engine):
    assert httpx.get(f"{address}/metrics").status_code == 200  # before any round, too
    client.completions.create(model=MODEL, prompt=[7, 7], max_tokens=8)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=MODEL, prompt=[7, 7], temperature=-1)
    found = {name: metric(address, f"serve_{name}") for name in ("accept_length", "accept_rate", "rounds_total")}
    seen = engine.acceptance
    assert found == {
        "accept_length": seen.accept_length, "accept_rate": seen.accept_rate, "rounds_total": seen.num_rounds
    }  # fmt: skip
    assert metric(address, "serve_generated_tokens_total") == 8
    assert metric(address, "serve_prompt_tokens_total") == 2
    assert metric(address, 'serve_requests_total{outcome="length"}') == 1
    assert metric(address, 'serve_requests_total{outcome="refused"}') == 1
    assert metric(address, 'serve_accept_rate_at_k{k="2"}') == seen.accept_rate_at_k[1]


def test_metrics_are_what_prometheus_reads(client, address):
    client.completions.create(model=MODEL, prompt=[7, 7], max_tokens=8)
    families = {family.name for family in text_string_to_metric_families(httpx.get(f"{address}/metrics").text)}
    assert {"serve_requests", "serve_accepted_tokens", "serve_accept_length"} <= families


def test_running_and_later_requests_and_health_report_an_engine_that_fails(client, address, engine):
    engine.step_seconds = 0.02
    stream = client.completions.create(model=MODEL, prompt=[7, 7], max_tokens=150, stream=True)
    next(iter(stream))
    caught = []

    def ask():
        try:
            client.completions.create(model=MODEL, prompt=[7, 7], max_tokens=150)
        except openai.APIStatusError as error:
            caught.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    assert until(lambda: engine.num_running == 2)
    engine.failure = RuntimeError("out of memory")
    thread.join()
    assert [error.status_code for error in caught] == [500]
    assert "RuntimeError: out of memory" in str(caught[0])
    with pytest.raises(openai.APIError, match="out of memory"):
        list(stream)
    with pytest.raises(openai.InternalServerError, match="out of memory") as later:
        client.completions.create(model=MODEL, prompt="Go")
    assert later.value.status_code == 503
    health = httpx.get(f"{address}/health")
    assert (health.status_code, health.json()["reason"]) == (503, "RuntimeError: out of memory")
    assert metric(address, "serve_healthy") == 0


PLAIN_ANSWER = "It is 42 🎉: naïve, <b>indeed</b>."


@pytest.fixture(scope="module")
def chatml_client():
    """A server whose target's chat format has no channels."""
    words = chatml_tokenizer()
    stops = stop_token_ids(words)
    engine = FakeEngine(lambda request: [*words.encode(PLAIN_ANSWER), stops[0]], stops)
    with (
        serving(engine, words) as address,
        client_of(address) as client,
    ):
        yield client


def test_where_there_are_no_channels_the_whole_answer_is_the_content(chatml_client):
    reply = chatml_client.chat.completions.create(model=MODEL, messages=[USER])
    message = reply.choices[0].message
    assert (message.content, message.reasoning_content) == (PLAIN_ANSWER, None)
    assert reply.choices[0].finish_reason == "stop"
    words = chatml_tokenizer()
    assert reply.usage.prompt_tokens == len(render_prompt(words, [USER], "low"))
    assert reply.usage.completion_tokens == len(words.encode(PLAIN_ANSWER)) + 1


def test_where_there_are_no_channels_a_streamed_answer_adds_up_and_a_stop_string_ends_it(chatml_client):
    chunks = chatml_client.chat.completions.create(model=MODEL, messages=[USER], stream=True, stop=[", <b>"])
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == PLAIN_ANSWER.split(", <b>")[0]
    assert sum(map(bool, pieces)) > 1


def test_where_there_are_no_efforts_asking_for_one_is_refused(chatml_client):
    with pytest.raises(openai.BadRequestError, match="tiny knows no reasoning efforts: leave it out") as refused:
        chatml_client.chat.completions.create(model=MODEL, messages=[USER], reasoning_effort="high")
    assert refused.value.param == "reasoning_effort"


def test_where_there_are_no_tools_offering_one_is_refused(chatml_client):
    with pytest.raises(openai.BadRequestError, match="tiny knows no tools: leave them out") as refused:
        chatml_client.chat.completions.create(model=MODEL, messages=[USER], tools=[TOOL])
    assert refused.value.param == "tools"


def test_the_plain_arm_has_no_rounds_to_report(tokenizer):
    plain = create_engine(tokenizer, block_size=None, round_tokens=1)
    with (
        serving(plain, tokenizer) as address,
        client_of(address) as client,
    ):
        reply = client.chat.completions.create(model=MODEL, messages=[USER])
        assert reply.choices[0].message.content == FINAL
        assert reply.usage.completion_tokens_details.accepted_prediction_tokens is None
        assert "accept_" not in httpx.get(f"{address}/metrics").text


@pytest.mark.parametrize("stream", [False, True])
def test_the_server_ends_quickly_and_answers_a_request_in_flight(engine, tokenizer, monkeypatch, stream):
    monkeypatch.setattr(server, "GRACE_SECONDS", 0.3)
    engine.step_seconds = 0.1
    body = {"model": MODEL, "prompt": [7, 7], "max_tokens": 150, "stream": stream}
    replies = []
    with serving(engine, tokenizer) as address:
        thread = threading.Thread(
            target=lambda: replies.append(httpx.post(f"{address}/v1/completions", json=body, timeout=20))
        )
        thread.start()
        assert until(lambda: engine.num_running == 1)
        started = time.monotonic()
    assert time.monotonic() - started < 3
    thread.join()
    assert replies[0].status_code == (200 if stream else 503)
    assert "shutting down" in replies[0].text


def test_a_port_in_use_is_named():
    with contextlib.closing(server.bind("127.0.0.1", 0)) as listener:
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(PipelineError, match=f"serve.port is {port}, which is in use"):
            server.bind("127.0.0.1", port)
    with pytest.raises(PipelineError, match=r"serve.host is '192\.0\.2\.1'"):
        server.bind("192.0.2.1", 0)


def test_metrics_that_mean_the_same_have_vllms_names(client, address, engine):
    client.completions.create(model=MODEL, prompt=[7, 7], max_tokens=8)
    families = {family.name: family for family in text_string_to_metric_families(httpx.get(f"{address}/metrics").text)}
    samples = {
        (sample.name, sample.labels.get("position") or sample.labels.get("finished_reason")): sample
        for family in families.values()
        for sample in family.samples
    }
    wanted = {
        ("vllm:num_requests_running", None): 0,
        ("vllm:num_requests_waiting", None): 0,
        ("vllm:prompt_tokens_total", None): 2,
        ("vllm:generation_tokens_total", None): 8,
        ("vllm:request_success_total", "length"): 1,
        ("vllm:spec_decode_num_drafts_total", None): 3,  # rounds of 3, 3 and 1 tokens
        ("vllm:spec_decode_num_draft_tokens_total", None): 21,
        ("vllm:spec_decode_num_accepted_tokens_total", None): 4,
        ("vllm:spec_decode_num_accepted_tokens_per_pos_total", "0"): 2,
        ("vllm:spec_decode_num_accepted_tokens_per_pos_total", "1"): 2,
        ("vllm:spec_decode_num_accepted_tokens_per_pos_total", "2"): 0,
        ("vllm:time_to_first_token_seconds_count", None): 1,
        ("vllm:inter_token_latency_seconds_count", None): 3,
        ("vllm:e2e_request_latency_seconds_count", None): 1,
    }
    assert {key: samples[key].value for key in wanted} == wanted
    assert families["vllm:time_to_first_token_seconds"].type == "histogram"
    assert {sample.labels["model_name"] for (name, _), sample in samples.items() if name.startswith("vllm:")} == {MODEL}
    assert metric(address, "serve_step_seconds_total") == metric(address, "serve_host_seconds_total") == 0
