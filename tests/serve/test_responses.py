"""/v1/responses, through OpenAI's own client."""

import asyncio

import httpx
import openai
import pytest

from pipeline.prompts.chat_format import render_prompt
from pipeline.serve.errors import ApiError
from pipeline.serve.response_store import ResponseStore
from tests.serve.test_api import ANALYSIS, ARGUMENTS, CALLING, FINAL, TOOL, USER, create_engine, seen_prompts
from tests.support.serving import MODEL, client_of, serving

FLAT = {"type": "function", **TOOL["function"]}
QUESTION = USER["content"]


@pytest.fixture
def engine(tokenizer):
    return create_engine(tokenizer, max_length=400)


@pytest.fixture
def address(engine, tokenizer):
    with serving(engine, tokenizer) as address:
        yield address


@pytest.fixture
def client(address):
    with client_of(address) as client:
        yield client


def test_a_response_has_the_analysis_and_the_text_as_items(client, tokenizer):
    response = client.responses.create(model=MODEL, input=QUESTION)
    reasoning, message = response.output
    assert (response.status, response.output_text, response.error) == ("completed", FINAL, None)
    assert (reasoning.type, reasoning.content[0].text) == ("reasoning", ANALYSIS)
    assert (message.type, message.role, message.status) == ("message", "assistant", "completed")
    assert response.usage.input_tokens == len(render_prompt(tokenizer, [USER], "low"))
    assert response.usage.output_tokens_details.reasoning_tokens > 0
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens


def shown(item):
    """Its kind, state and texts."""
    return item.type, item.status, [part.text for part in item.content]


def test_a_streamed_response_adds_up_to_the_whole(client):
    whole = client.responses.create(model=MODEL, input=QUESTION, store=False)
    with client.responses.stream(model=MODEL, input=QUESTION, store=False) as stream:
        events = list(stream)
        found = stream.get_final_response()
    assert found.output_text == whole.output_text
    assert [shown(item) for item in found.output] == [shown(item) for item in whole.output]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
    assert kinds[-1] == "response.completed"
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    thought = "".join(event.delta for event in events if event.type == "response.reasoning_text.delta")
    assert (deltas, thought) == (FINAL, ANALYSIS)
    assert found.usage == whole.usage


def test_a_response_cut_by_its_limit_says_so(client):
    response = client.responses.create(model=MODEL, input=QUESTION, max_output_tokens=6)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    events = list(client.responses.create(model=MODEL, input=QUESTION, max_output_tokens=6, stream=True))
    assert events[-1].type == "response.incomplete"


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_is_an_item_and_its_result_goes_back_as_one(client, engine, tokenizer, stream):
    seen = seen_prompts(engine)
    if stream:
        events = list(client.responses.create(model=MODEL, input=QUESTION, tools=[FLAT], stream=True))
        first = events[-1].response
        pieces = [event for event in events if event.type == "response.function_call_arguments.delta"]
        assert "".join(event.delta for event in pieces) == ARGUMENTS
    else:
        first = client.responses.create(model=MODEL, input=QUESTION, tools=[FLAT])
    reasoning, call = first.output
    assert (call.type, call.name, call.arguments) == ("function_call", "add", ARGUMENTS)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "42"}
    history = [{"role": "user", "content": QUESTION}, reasoning.model_dump(), call.model_dump(), result]
    second = client.responses.create(model=MODEL, input=history, tools=[FLAT])
    third = client.responses.create(model=MODEL, input=[result], tools=[FLAT], previous_response_id=first.id)
    assert second.output_text == third.output_text == FINAL
    turns = [USER, CALLING | {"thinking": ANALYSIS}, {"role": "tool", "tool_call_id": "1", "content": "42"}]
    prompts = [tuple(render_prompt(tokenizer, asked, "low", tools=[TOOL])) for asked in ([USER], turns, turns)]
    assert seen == prompts


def test_a_conversation_goes_on_from_a_stored_response(client, engine, tokenizer, address):
    first = client.responses.create(model=MODEL, input=QUESTION, instructions="Be kind.")
    seen = seen_prompts(engine)
    second = client.responses.create(model=MODEL, input="And 1 + 1?", previous_response_id=first.id)
    turns = [USER, {"role": "assistant", "content": FINAL}, {"role": "user", "content": "And 1 + 1?"}]
    assert seen == [tuple(render_prompt(tokenizer, turns, "low"))]  # instructions are each request's own
    assert client.responses.retrieve(second.id).output_text == FINAL
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError, match="there is no response"):
        client.responses.create(model=MODEL, input="x", previous_response_id=first.id)
    unstored = client.responses.create(model=MODEL, input=QUESTION, store=False)
    assert httpx.get(f"{address}/v1/responses/{unstored.id}").status_code == 404


def test_log_probabilities_stand_with_the_text(client):
    response = client.responses.create(model=MODEL, input=QUESTION, top_logprobs=1)
    found = response.output[1].content[0].logprobs
    assert b"".join(bytes(one.bytes) for one in found).decode() == FINAL


def test_the_asynchronous_client_streams_too(address):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            stream = await client.responses.create(model=MODEL, input=QUESTION, stream=True)
            return "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])

    assert asyncio.run(ask()) == FINAL


def test_an_effort_is_asked_for(client, engine, tokenizer):
    seen = seen_prompts(engine)
    response = client.responses.create(model=MODEL, input=QUESTION, reasoning={"effort": "high"})
    assert seen == [tuple(render_prompt(tokenizer, [USER], "high"))]
    assert response.reasoning.effort == "high"


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input"),
        ({"input": [{"type": "function_call", "name": 5}]}, "input"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"text": {"format": {"type": "xml"}}}, "text"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"messages": []}, "messages"),
    ],
)
def test_what_is_not_served_is_refused_by_name(address, extra, param):
    reply = httpx.post(f"{address}/v1/responses", json={"model": MODEL, "input": QUESTION, **extra})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param


def test_the_store_holds_the_latest_responses_in_its_bytes():
    store = ResponseStore(1000)
    for index in range(20):
        store.put({"id": str(index)}, [{"content": "x" * 200}])
        if index == 10:
            store.items("8")
    found = []
    for index in range(20):
        try:
            found += [index] if store.items(str(index)) else []
        except ApiError as error:
            assert error.status == 404  # noqa: PT017
    assert found[-1] == 19
    assert len(found) == 4
