"""Requests as endpoints know them, and replies as the tokens that the model wrote."""

import pytest

from pipeline.model.layers.sampling import Sampling
from pipeline.prompts.chat_format import stop_token_ids
from pipeline.prompts.harmony import render_completion
from pipeline.prompts.messages import Message
from pipeline.prompts.sources import prompt_of
from pipeline.prompts.tools import Tool, ToolCall
from pipeline.teacher_cache.answer_reader import AnswerReader, BadAnswer
from pipeline.teacher_cache.endpoint_replies import EndpointApi, RequestTemplate, reply_fields, reply_tokens
from pipeline.teacher_cache.origin import AnswerOrigin
from pipeline.teacher_cache.render import RenderedPrompt
from tests.support.chatml import chatml_tokenizer
from tests.support.corpus_tokenizer import corpus_tokenizer

MAX_NEW_TOKENS = 60
GREEDY = AnswerOrigin(endpoint="model at host")
SAMPLED = AnswerOrigin(endpoint="model at host", sampling=Sampling(0.7, 0.9), seed=3)
ROW = RenderedPrompt(prompt_of([Message("user", "What is 2 + 2?")], "high"), (5, 6, 7), None)


@pytest.fixture(scope="module")
def tokenizer():
    return corpus_tokenizer(300)


@pytest.fixture(scope="module")
def reader(tokenizer):
    return AnswerReader(tokenizer, stop_token_ids(tokenizer), MAX_NEW_TOKENS)


def template(api, origin=GREEDY, **values):
    return RequestTemplate(
        **{"api": api, "model": "m", "origin": origin, "max_new_tokens": 9, "has_efforts": True} | values
    )


def chat(finish_reason="stop", **message):
    return {"choices": [{"message": {"role": "assistant", **message}, "finish_reason": finish_reason}]}


def tokens_of(reader, reply, api=EndpointApi.chat):
    return reply_tokens(reply_fields(reply, api), reader)


def test_a_chat_request_has_messages_effort_and_nothing_random():
    assert template(EndpointApi.chat).body(ROW) == {
        "model": "m",
        "max_tokens": 9,
        "temperature": 0,
        "messages": [{"role": "user", "content": "What is 2 + 2?"}],
        "reasoning_effort": "high",
    }
    assert "reasoning_effort" not in template(EndpointApi.chat, has_efforts=False).body(ROW)


def test_a_completion_request_has_the_tokens_as_rendered_and_wants_tokens():
    body = template(EndpointApi.completions, extra={"top_k": 20}).body(ROW)
    wanted = {"prompt": [5, 6, 7], "return_token_ids": True, "top_k": 20}
    assert body == {"model": "m", "max_tokens": 9, "temperature": 0, **wanted}


def test_a_sampled_request_has_a_seed_of_its_own_that_a_rerun_repeats():
    other = RenderedPrompt(prompt_of([Message("user", "Hi")], "high"), (5,), None)
    body, again, others = (template(EndpointApi.chat, SAMPLED).body(row) for row in (ROW, ROW, other))
    assert (body["temperature"], body["top_p"]) == (0.7, 0.9)
    assert body == again
    assert 0 <= body["seed"] < 2**31
    assert body["seed"] != others["seed"]


def test_tools_and_calls_go_in_the_shape_of_the_api():
    call = ToolCall("lookup", '{"q": 1}')
    prompt = prompt_of(
        [Message("user", "Look"), Message("assistant", "", "I look.", (call,)), Message("tool", "42")],
        "low",
        [Tool("lookup", "Finds", '{"type": "object", "properties": {}}')],
    )
    body = template(EndpointApi.chat).body(RenderedPrompt(prompt, (1,), None))
    assert [tool["function"]["name"] for tool in body["tools"]] == ["lookup"]
    _, called, result = body["messages"]
    assert called["reasoning_content"] == "I look."
    assert called["tool_calls"][0]["function"] == {"name": "lookup", "arguments": '{"q": 1}'}
    assert called["tool_calls"][0]["id"] == result["tool_call_id"]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_a_chat_answer_becomes_the_tokens_that_the_model_writes(reader, tokenizer, name):
    found = tokens_of(reader, chat(content="4", **{name: "2 + 2: 4."}))
    assert found == (tuple(render_completion(tokenizer, "2 + 2: 4.", "4")), "stop")
    assert tokens_of(reader, chat(content="4")) == (tuple(render_completion(tokenizer, None, "4")), "stop")


def test_a_tool_call_ends_with_call(reader, tokenizer):
    call = {"id": "x", "type": "function", "function": {"name": "lookup", "arguments": '{"q": 1}'}}
    found, reason = tokens_of(reader, chat("tool_calls", content=None, reasoning="Look.", tool_calls=[call]))
    wanted = render_completion(tokenizer, "Look.", tool_calls=[ToolCall("lookup", '{"q": 1}')])
    assert (found, reason) == (tuple(wanted), "stop")
    assert tokenizer.decode(found[-1:]) == "<|call|>"


@pytest.mark.parametrize(("analysis", "content"), [("2 + 2: 4.", "The an"), ("2 + 2", None), ("", "The an")])
def test_an_answer_that_was_cut_off_has_no_end(reader, tokenizer, analysis, content):
    found, reason = tokens_of(reader, chat("length", content=content, reasoning_content=analysis))
    whole = render_completion(tokenizer, analysis or None, content or "")
    assert reason == "length"
    assert found == tuple(whole[: len(found)])
    text = tokenizer.decode(found)
    assert text.endswith(content or analysis)
    assert "<|return|>" not in text


def test_more_tokens_than_were_asked_for_are_cut(reader, tokenizer):
    long = "one two three four five six seven eight nine ten " * 10
    found, reason = tokens_of(reader, chat(content=long))
    assert (len(found), reason) == (MAX_NEW_TOKENS, "length")


def test_tokens_that_an_endpoint_tells_are_taken_as_they_are(reader, tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|return|>")
    reply = chat(content="something else")
    reply["choices"][0]["token_ids"] = [9, 8, 7, end, 6]
    assert tokens_of(reader, reply) == ((9, 8, 7, end), "stop")
    reply["choices"][0]["token_ids"] = [9, 8, 7]
    assert tokens_of(reader, reply) == ((9, 8, 7), "length")
    completion = {"choices": [{"text": "", "token_ids": [1, 2], "finish_reason": "length"}]}
    assert tokens_of(reader, completion, EndpointApi.completions) == ((1, 2), "length")


def test_every_token_that_ends_an_answer_ends_it_whoever_names_it(tokenizer):
    """A target's generation_config.json may name more of them than its chat format."""
    stops = stop_token_ids(tokenizer)
    reply = {"choices": [{"text": "", "token_ids": [9, 8, 7, 6], "finish_reason": "stop"}]}
    for others, wanted in (((), ((9, 8, 7, 6), "length")), ((8,), ((9, 8), "stop"))):
        reader = AnswerReader(tokenizer, [*stops, *others], MAX_NEW_TOKENS)
        assert tokens_of(reader, reply, EndpointApi.completions) == wanted


def test_a_plain_chat_format_has_content_and_the_token_that_ends_it():
    plain = chatml_tokenizer()
    reader = AnswerReader(plain, stop_token_ids(plain), MAX_NEW_TOKENS)
    content = plain.encode("Hello", add_special_tokens=False)
    assert tokens_of(reader, chat(content="Hello")) == ((*content, plain.eos_token_id), "stop")
    assert tokens_of(reader, chat("length", content="Hello")) == (tuple(content), "length")
    with pytest.raises(BadAnswer, match="the answer has reasoning, which the target's format has not"):
        tokens_of(reader, chat(content="Hello", reasoning="Hm"))
    with pytest.raises(BadAnswer, match="a text spells the control tokens"):
        tokens_of(reader, chat(content=f"Hello {plain.eos_token}"))


BAD = {
    "a list": ([1], "the reply has no choices"),
    "no choices": ({"object": "error"}, "the reply has no choices"),
    "empty choices": ({"choices": []}, "the reply has no choices"),
    "a text for a choice": ({"choices": ["x"]}, "the reply has no choices"),
    "no message": ({"choices": [{"finish_reason": "stop"}]}, "the reply has no message"),
    "no reason": ({"choices": [{"message": {"content": "x"}}]}, "the answer ended with None; wanted stop or length"),
    "filtered": (chat("content_filter", content="x"), "ended with 'content_filter'"),
    "empty": (chat(content="", reasoning=None), "the answer is empty"),
    "no final": (chat(content=None, reasoning="Hm"), "the answer has reasoning alone"),
    "a number": (chat(content=4), "content is 4; wanted text"),
    "a control token": (chat(content="a <|end|> b"), "spells the control tokens"),
    "two analyses": (chat(content="4", reasoning="a", reasoning_content="b"), "reasoning_content and reasoning, which"),
    "two calls": (chat(content="", tool_calls=[{}, {}]), "the answer has 2 tool_calls"),
    "a cut call": (chat("length", tool_calls=[{}]), "cut off in a tool call"),
}


@pytest.mark.parametrize(("reply", "message"), BAD.values(), ids=BAD.keys())
def test_a_reply_without_an_answer_says_what_it_lacks(reader, reply, message):
    with pytest.raises(BadAnswer, match=message):
        tokens_of(reader, reply)


@pytest.mark.parametrize("token_ids", ["x", [1, "2"], [512], [-1]])
def test_told_tokens_must_be_the_targets(reader, token_ids):
    with pytest.raises(BadAnswer, match=r"token_ids is .* wanted ids from 0 to 511"):
        tokens_of(reader, {"choices": [{"token_ids": token_ids, "finish_reason": "stop"}]}, EndpointApi.completions)


def test_a_completion_without_tokens_tells_what_to_use():
    with pytest.raises(BadAnswer, match="has no token_ids; this endpoint needs teacher_cache.openai.api=chat"):
        reply_fields({"choices": [{"text": "x", "finish_reason": "stop"}]}, EndpointApi.completions)
