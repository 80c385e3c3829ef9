import pytest

from pipeline.errors import PipelineError
from pipeline.prompts.harmony import render_completion
from pipeline.prompts.tools import ToolCall

CALL = ToolCall("get_weather", '{"place":"Oslo"}')


def spelled(tokenizer, *parts, **more):
    return tokenizer.decode(render_completion(tokenizer, *parts, **more))


@pytest.mark.parametrize(
    ("parts", "tool_calls", "text"),
    [
        (
            ("a", "b"),
            (),
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b<|return|>",
        ),
        ((None, "b"), (), "<|channel|>final<|message|>b<|return|>"),
        (
            ("a", None),
            (CALL,),
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather "
            '<|constrain|>json<|message|>{"place":"Oslo"}<|call|>',
        ),
        (
            (None, "I look."),
            (CALL,),
            "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>commentary "
            'to=functions.get_weather <|constrain|>json<|message|>{"place":"Oslo"}<|call|>',
        ),
    ],
    ids=["analysis and final", "final alone", "call", "preamble and call"],
)
def test_an_answer_has_its_analysis_its_text_and_its_call(tokenizer, parts, tool_calls, text):
    assert spelled(tokenizer, *parts, tool_calls=tool_calls) == text


@pytest.mark.parametrize(
    ("parts", "tool_calls", "message"),
    [
        (("a", None), (), "neither a final text nor a tool call; wanted one of them"),
        ((None, None), (CALL, CALL), "has 2 tool calls; a call ends the turn: wanted one at most"),
        ((None, None), (ToolCall("a b", "{}"),), "calls a function named 'a b'; wanted letters"),
        ((None, None), (ToolCall("f", "[1]"),), r"calls f with arguments '\[1\]'; wanted a JSON object"),
        ((None, None), (ToolCall("f", "{"),), "calls f with arguments '{'; wanted a JSON object"),
        (("a<|end|>", "b"), (), r"spells the control tokens <\|end\|>"),
        ((None, None), (ToolCall("f", '{"a": "<|call|>"}'),), r"spells the control tokens <\|call\|>"),
    ],
    ids=["no end", "two calls", "name", "array", "no JSON", "control token", "control token in a call"],
)
def test_what_is_no_answer_is_refused(tokenizer, parts, tool_calls, message):
    with pytest.raises(PipelineError, match=message):
        render_completion(tokenizer, *parts, tool_calls=tool_calls)
