import pytest

from pipeline.prompts.messages import Message, message_of, messages_problem
from pipeline.prompts.tools import Tool, ToolCall, tools_of, tools_problem

USER = {"role": "user", "content": "Weather?"}
CALL = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Oslo"}'}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "a", "content": "sunny"}
FINAL = {"role": "assistant", "content": "It is sunny."}


def calling(**changes):
    return CALLING | changes


def function(**changes):
    return {"type": "function", "function": {"name": "weather"} | changes}


ACCEPTED = {
    "user": [USER],
    "developer": [{"role": "developer", "content": "Be brief."}, USER],
    "turns": [USER, FINAL, USER],
    "result last": [USER, CALLING, RESULT],
    "answered": [USER, CALLING, RESULT, FINAL, USER],
    "two calls": [USER, CALLING, RESULT, CALLING, RESULT],
    "thinking": [USER, calling(content="", thinking="Look."), RESULT],
    "content": [USER, calling(content="Look."), RESULT],
    "empty result": [USER, CALLING, RESULT | {"content": ""}],
    "no result": [USER, CALLING, USER],
    "nulls": [USER | {"tool_calls": None, "thinking": None}, FINAL | {"tool_calls": []}, USER],
}


@pytest.mark.parametrize("messages", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_conversations_of_any_turns_that_end_with_the_user_or_a_tool_are_prompts(messages):
    assert messages_problem(messages) is None


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([USER, FINAL], "the last message is the assistant's; wanted the user's or a tool's: leave the reply out"),
        ([USER, CALLING], "the last message is the assistant's; wanted"),
        ([RESULT], "messages[0] is a tool's; wanted the assistant's call right before it"),
        ([USER, CALLING, RESULT, RESULT], "messages[3] is a tool's; wanted the assistant's call right before it"),
        ([USER, FINAL, RESULT], "messages[2] is a tool's; wanted"),
        (
            [USER, CALLING, RESULT | {"tool_call_id": "b"}],
            "messages[2] has tool_call_id 'b'; wanted that of the call before it, 'a'",
        ),
        ([USER, CALLING, RESULT | {"content": None}], "messages[2] has content None; wanted a string"),
        ([USER | {"tool_calls": [CALL]}], "messages[0] has role 'user' and tool_calls; the assistant alone calls"),
        ([USER | {"thinking": "x"}], "messages[0] has role 'user' and thinking; the assistant alone thinks"),
        (
            [USER, calling(tool_calls=[CALL, CALL]), RESULT],
            "messages[1] has 2 tool_calls; wanted one: Harmony's turns end with a call, give each its own message",
        ),
        ([USER, calling(tool_calls="x"), RESULT], "messages[1] has tool_calls 'x'; wanted a list of one call"),
        ([USER, calling(tool_calls=["x"]), RESULT], "messages[1] has the tool call 'x'; wanted"),
        (
            [USER, calling(tool_calls=[{"function": {"name": "weather", "arguments": "Oslo"}}]), RESULT],
            "messages[1] calls weather with arguments 'Oslo'; wanted a JSON object",
        ),
        (
            [USER, calling(tool_calls=[{"function": {"name": "a b", "arguments": "{}"}}]), RESULT],
            "messages[1] calls a function named 'a b'; wanted letters, digits, dots, dashes and underscores",
        ),
        (
            [USER, calling(content="I look.", thinking="Look."), RESULT],
            "messages[1] has content and thinking beside a tool call; the template writes one of them",
        ),
        ([USER, calling(thinking=5), RESULT], "messages[1] has thinking 5; wanted a string"),
        (
            [USER, calling(thinking="a", reasoning="b"), RESULT],
            "messages[1] has thinking and reasoning, which differ; wanted one of them",
        ),
        ([USER, {"role": "assistant", "content": None}, USER], "messages[1] has content None; wanted a string"),
        ([{"role": "developer", "content": ""}, USER], "messages[0] has empty content; wanted text"),
    ],
    ids=[
        "reply",
        "call without result",
        "result alone",
        "second result",
        "result of no call",
        "another id",
        "no result",
        "user calls",
        "user thinks",
        "parallel calls",
        "no list",
        "no call",
        "no JSON",
        "name",
        "two analyses",
        "thinking is no text",
        "two names of one thing",
        "silent assistant",
        "empty instructions",
    ],
)
def test_what_a_template_would_drop_or_misread_is_named(messages, problem):
    assert (messages_problem(messages) or "").startswith(problem)


def test_a_message_is_the_same_by_any_spelling_of_its_fields():
    wanted = Message("assistant", "", "Look.", (ToolCall("weather", '{"place": "Oslo"}'),))
    by_object = {"function": {"name": "weather", "arguments": {"place": "Oslo"}}}
    for spelled in (
        calling(thinking="Look."),
        calling(reasoning_content="Look.", reasoning="Look."),
        calling(thinking="Look.", tool_calls=[by_object]),
        wanted.as_dict(),
    ):
        assert message_of(spelled) == wanted


def test_a_message_of_a_role_and_a_content_has_no_other_fields():
    assert message_of(USER | {"tool_calls": None}).as_dict() == USER


def test_tools_keep_the_order_of_their_parameters_and_what_templates_need():
    parameters = {"type": "object", "properties": {"b": {}, "a": {}}}
    offered = [function(description="D.", parameters=parameters, strict=True), function(name="now", description=None)]
    assert tools_problem(offered) is None
    weather, now = tools_of(offered)
    assert list(weather.as_dict()["function"]["parameters"]["properties"]) == ["b", "a"]
    assert now == Tool("now", "")
    assert now.as_dict() == {"type": "function", "function": {"name": "now", "description": ""}}


@pytest.mark.parametrize(
    ("tools", "problem"),
    [
        ("x", "tools is 'x'; wanted a list of functions"),
        ([function(), {"type": "function"}], "tools[1] is {'type': 'function'}; wanted"),
        ([{"type": "web_search", "function": {"name": "f"}}], "tools[0] is"),
        ([function(name="a b")], "tools[0] is named 'a b'; wanted letters"),
        ([function(description=5)], "tools[0] (weather) has description 5; wanted a string"),
        ([function(parameters="x")], "tools[0] (weather) has parameters 'x'; wanted the JSON Schema of an object"),
        ([function(parameters={"properties": []})], "tools[0] (weather) has parameters {'properties': []}; wanted"),
        ([function(), function()], "tools has weather more than once; wanted each function once"),
    ],
    ids=["no list", "no function", "another type", "name", "description", "parameters", "properties", "twice"],
)
def test_what_is_no_tool_is_named(tools, problem):
    assert (tools_problem(tools) or "").startswith(problem)
