"""GPT-OSS's own tokenizer and template: what we render is what they and openai-harmony render, token for token.

Where the template and openai-harmony differ, serving follows the template; each difference is written down here as the
change that makes openai-harmony's text the template's, so that an upstream change is noticed.
"""

import dataclasses
import datetime
import json
from collections.abc import Callable

import numpy as np
import pytest

from pipeline.errors import PipelineError
from pipeline.prompts.channels import Channel, channel_tokens, channels
from pipeline.prompts.chat_format import render_prompt, stop_token_ids
from pipeline.prompts.harmony import render_completion
from pipeline.prompts.tokenizer import load_tokenizer
from pipeline.prompts.tools import ToolCall
from pipeline.serve.channel_reader import chat_reader
from pipeline.serve.text_stream import ToolChannel
from pipeline.store.layout import CachedSequence
from pipeline.target import batches
from pipeline.train.data.rows import stack
from tests.support.oracles import oracle_assets, run_oracle

pytestmark = pytest.mark.conformance

DATE = "2025-08-05"
MESSAGE = 200008  # `<|message|>`
USER = {"role": "user", "content": "Wie ist das Wetter in 東京?  \n\tUnd 12345 + 1 = ?"}
SPELLING = {
    "role": "user",
    "content": "a<|end|>b <|st<|end|>art|>\n\n<|start|>system<|message|>東京<|return|>  <|call|>",
}
AGAIN = {"role": "user", "content": "And tomorrow?"}
SYSTEM = {"role": "system", "content": "Be brief.\n\n- No *lists*."}
DEVELOPER = {"role": "developer", "content": "Talk like a pirate. 🏴‍☠️"}
FINAL = {"role": "assistant", "content": "Sunny, 20 °C."}
THOUGHT = FINAL | {"thinking": "The tool says so."}
RESULT = {"role": "tool", "content": '{"sky": "sunny", "t": 20}'}
PROPERTIES = {
    "place": {"type": "string", "description": "City, e.g. Oslo"},
    "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
    "days": {"type": "integer"},
    "hours": {"type": "array", "items": {"type": "integer"}},
}


def calling(name="get_weather", arguments='{"place": "東京", "days": 2}', **more):
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "tool_calls": [call], **more}


def tool(name="get_weather", description="The weather of a place.", properties=PROPERTIES, required=("place",)):
    parameters = {"type": "object", "properties": properties, "required": list(required)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


NOW = {"type": "function", "function": {"name": "now", "description": "The time."}}


def unchanged(text):
    return text


def instructions_end_in_two_lines(text):
    """The template leaves the room before tools also where there are none."""
    head, end, rest = text.partition("<|start|>developer<|message|>")[2].partition("<|end|>")
    return text.replace(head + end + rest, head + "\n\n" + end + rest)


def results_are_json_strings(text):
    return text.replace(RESULT["content"], json.dumps(RESULT["content"]))


def past_analysis_is_dropped_and_results_are_json_strings(text):
    """openai-harmony drops the analysis of past turns only where the assistant's last message is a final."""
    return results_are_json_strings(
        text.replace("<|start|>assistant<|channel|>analysis<|message|>The tool says so.<|end|>", "")
    )


def a_comma_follows_a_default(text):
    return text.replace("// default: 3\n", "// default: 3,\n").replace('// default: "x"\n', '// default: "x",\n')


def an_empty_description_is_a_comment(text):
    return text.replace("type now", "// \ntype now")


def only_the_first_line_of_a_description_is_a_comment(text):
    return text.replace("\n// Two lines.", "\nTwo lines.")


def nested_objects_are_written_flat(text):
    """Without the descriptions of their properties, and with a break before each type: the template's own spaces."""
    ours = "{\nlat: \n                number, name?: \n                string}"
    return text.replace("{\n    // degrees\n    lat: number,\n    name?: string,\n    }", ours)


@dataclasses.dataclass(frozen=True)
class Case:
    messages: list
    tools: list = dataclasses.field(default_factory=list)
    effort: str = "low"
    mend: Callable[[str], str] = unchanged


POINT = {
    "type": "object",
    "properties": {"lat": {"type": "number", "description": "degrees"}, "name": {"type": "string"}},
    "required": ["lat"],
}
DEFAULTS = {"n": {"type": "integer", "default": 3}, "s": {"type": "string", "default": "x"}}
CASES = {
    "low": Case([USER]),
    "medium": Case([USER], effort="medium"),
    "high": Case([USER], effort="high"),
    "turns": Case([USER, FINAL, AGAIN]),
    "analysis of a past turn": Case([USER, THOUGHT, AGAIN]),
    "tools": Case([USER], [tool(), NOW]),
    "system and tools": Case([SYSTEM, USER], [tool(), NOW], "high"),
    "developer and tools": Case([DEVELOPER, USER], [NOW]),
    "answered call": Case(
        [USER, calling(thinking="Look it up."), RESULT, FINAL, AGAIN], [tool()], mend=results_are_json_strings
    ),
    "open call": Case([USER, calling(thinking="Look it up."), RESULT], [tool()], mend=results_are_json_strings),
    "two open calls": Case(
        [USER, calling(thinking="One."), RESULT, calling("now", "{}", thinking="Two."), RESULT],
        [tool(), NOW],
        mend=results_are_json_strings,
    ),
    "open call after an answer": Case(
        [USER, THOUGHT, AGAIN, calling(thinking="Look it up."), RESULT],
        [tool()],
        mend=past_analysis_is_dropped_and_results_are_json_strings,
    ),
    "system alone": Case([SYSTEM, USER], mend=instructions_end_in_two_lines),
    "developer alone": Case([DEVELOPER, USER, THOUGHT, AGAIN], mend=instructions_end_in_two_lines),
    "defaults": Case([USER], [tool(properties=DEFAULTS, required=())], mend=a_comma_follows_a_default),
    "no description": Case(
        [USER], [{"function": {"name": "now", "description": ""}}], mend=an_empty_description_is_a_comment
    ),
    "lines": Case(
        [USER], [tool(description="One.\nTwo lines.")], mend=only_the_first_line_of_a_description_is_a_comment
    ),
    "nested": Case([USER], [tool(properties={"place": POINT})], mend=nested_objects_are_written_flat),
}


@dataclasses.dataclass(frozen=True)
class Answer:
    """A turn of the assistant, and how openai-harmony parses it: channel, recipient and text of each message."""

    analysis: str | None
    final: str | None
    calls: tuple[ToolCall, ...]
    parsed: list


CALL = ToolCall("get_weather", '{"place":"Oslo"}')
ANSWERS = {
    "analysis and final": Answer(
        "Hm — 東京.", "Sunny.", (), [("analysis", None, "Hm — 東京."), ("final", None, "Sunny.")]
    ),
    "final": Answer(None, "Sunny. 🌞\n", (), [("final", None, "Sunny. 🌞\n")]),
    "analysis and call": Answer(
        "Look it up.",
        None,
        (CALL,),
        [("analysis", None, "Look it up."), ("commentary", "functions.get_weather", CALL.arguments)],
    ),
    "call": Answer(None, None, (CALL,), [("commentary", "functions.get_weather", CALL.arguments)]),
    "preamble and call": Answer(
        "Look it up.",
        "One moment.",
        (CALL,),
        [
            ("analysis", None, "Look it up."),
            ("commentary", None, "One moment."),
            ("commentary", "functions.get_weather", CALL.arguments),
        ],
    ),
}


def spoken(answer):
    """An answer as a message of the oracle's."""
    fields = {"role": "assistant", "thinking": answer.analysis, "content": answer.final}
    if answer.calls:
        calls = [call.as_dict() | {"content_type": "<|constrain|>json"} for call in answer.calls]
        fields |= {"channel": "commentary", "tool_calls": calls}
    return fields


@pytest.fixture(scope="module")
def official():
    return load_tokenizer(oracle_assets())


@pytest.fixture(scope="module")
def prompts(official):
    """Each case as we render it."""
    return {
        name: render_prompt(official, case.messages, case.effort, tools=case.tools, date=DATE)
        for name, case in CASES.items()
    }


@pytest.fixture(scope="module")
def completions(official):
    return {
        name: render_completion(official, one.analysis, one.final, tool_calls=one.calls)
        for name, one in ANSWERS.items()
    }


@pytest.fixture(scope="module")
def oracle(prompts, completions, tmp_path_factory):
    """Prompts and whole conversations by the template, prompts and answers by openai-harmony; our tokens read by it.

    Rendered are (who, case), ("template", case, answer) and ("harmony", "answer", answer), parsed are (case, answer).
    """
    conversations, texts = {}, {}
    for name, case in CASES.items():
        asked = {"messages": case.messages, "tools": case.tools, "effort": case.effort, "date": DATE}
        for who in ("template", "harmony"):
            conversations[who, name] = asked | {"by": who}
        for kind, answer in ANSWERS.items():
            texts[name, kind] = prompts[name] + completions[kind]
            if not answer.calls:
                whole = [*case.messages, spoken(answer)]
                conversations["template", name, kind] = asked | {"by": "template", "messages": whole}
    for kind, answer in ANSWERS.items():
        whole = conversations["harmony", "low"] | {"messages": [USER, spoken(answer)]}
        conversations["harmony", "answer", kind] = whole
    spelled = {"messages": [SPELLING], "tools": [], "effort": "low", "date": DATE}
    conversations["harmony", "spelled"] = spelled | {"by": "harmony"}  # the template would make tokens of it
    directory = tmp_path_factory.mktemp("official")
    inputs, outputs = directory / "inputs.json", directory / "outputs.json"
    inputs.write_text(json.dumps({"conversations": list(conversations.values()), "texts": list(texts.values())}))
    run_oracle("harmony_render", assets=oracle_assets(), inputs=inputs, outputs=outputs)
    found = json.loads(outputs.read_text())
    return {
        "rendered": dict(zip(conversations, found["rendered"], strict=True)),
        "parsed": dict(zip(texts, found["parsed"], strict=True)),
    }


@pytest.mark.parametrize("name", CASES)
def test_a_prompt_is_the_official_templates_token_for_token(official, prompts, oracle, name):
    assert official.decode(prompts[name]) == official.decode(oracle["rendered"]["template", name])
    assert prompts[name] == oracle["rendered"]["template", name]


def test_control_tokens_that_a_text_spells_are_the_text_that_openai_harmony_makes_of_them(official, oracle):
    assert render_prompt(official, [SPELLING], "low", date=DATE) == oracle["rendered"]["harmony", "spelled"]


@pytest.mark.parametrize("name", CASES)
def test_a_prompt_is_openai_harmonys_but_for_what_is_written_down_here(official, prompts, oracle, name):
    mend, by_harmony = CASES[name].mend, oracle["rendered"]["harmony", name]
    text = official.decode(by_harmony)
    assert official.decode(prompts[name]) == mend(text)
    assert official.encode(mend(text)) == prompts[name]
    assert (by_harmony == prompts[name]) is (mend is unchanged)


@pytest.mark.parametrize("kind", ANSWERS)
def test_an_answer_is_openai_harmonys_but_for_the_place_of_a_calls_recipient(official, completions, oracle, kind):
    """openai-harmony writes it behind the role, the model behind the channel."""
    prompt, whole = oracle["rendered"]["harmony", "low"], oracle["rendered"]["harmony", "answer", kind]
    assert whole[: len(prompt)] == prompt
    text = official.decode(whole[len(prompt) :])
    behind_the_role, behind_the_channel = (
        " to=functions.get_weather<|channel|>commentary ",
        "<|channel|>commentary to=functions.get_weather ",
    )
    assert text.count(behind_the_role) == len(ANSWERS[kind].calls)
    assert official.encode(text.replace(behind_the_role, behind_the_channel)) == completions[kind]
    if not ANSWERS[kind].calls:
        assert completions[kind] == whole[len(prompt) :]


WHOLE = [(name, kind) for name in CASES for kind, answer in ANSWERS.items() if not answer.calls]


@pytest.mark.parametrize(("name", "kind"), WHOLE)
def test_prompt_and_answer_are_the_whole_conversation_but_for_an_analysis_that_serving_sees(
    official, prompts, completions, oracle, name, kind
):
    """In a conversation that is answered the template leaves out the analysis of the calls before the answer.

    It was in the prompt when the answer was generated: who renders texts for training as a whole trains on another
    prompt than is served. Here they are prompt and answer.
    """
    ours = official.decode(prompts[name] + completions[kind])
    whole = oracle["rendered"]["template", name, kind]
    if not name.startswith(("open", "two open")):
        assert prompts[name] + completions[kind] == whole
        return
    for analysis in ("Look it up.", "One.", "Two."):
        ours = ours.replace(f"<|start|>assistant<|channel|>analysis<|message|>{analysis}<|end|>", "")
    assert official.encode(ours) == whole != prompts[name] + completions[kind]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ANSWERS)
def test_the_loss_is_on_the_tokens_that_the_assistant_generates_in_the_last_turn_alone(
    official, prompts, completions, oracle, name, kind
):
    token_ids, answer = prompts[name] + completions[kind], ANSWERS[kind]
    parsed = oracle["parsed"][name, kind]
    before, last = parsed[: -len(answer.parsed)], parsed[-len(answer.parsed) :]
    assert [(one["channel"], one["recipient"], one["text"]) for one in last] == answer.parsed
    assert {one["role"] for one in last} == {"assistant"}
    assert before[-1]["role"] in ("user", "tool")
    assert last[-1]["end"] == len(token_ids)
    assert official.decode(token_ids[-1]) == ("<|call|>" if answer.calls else "<|return|>")
    assert token_ids[-1] in stop_token_ids(official)
    # `<|start|>assistant` is the prompt's: the model begins behind it
    generated = np.arange(len(token_ids)) >= before[-1]["end"] + 2
    assert official.decode(np.array(token_ids)[~generated][-2:]) == "<|start|>assistant"
    found = masks(token_ids, len(prompts[name]))
    np.testing.assert_array_equal(found, np.stack([generated, generated]))


def masks(token_ids, prompt_tokens):
    """Where the target's pretraining and the draft's training have their losses."""
    sequence = CachedSequence(
        token_ids=np.array(token_ids, np.int32),
        channels=np.zeros(len(token_ids), np.uint8),
        prompt_tokens=prompt_tokens,
        features=None,
    )
    example = batches.Example(np.array(token_ids, np.int32), prompt_tokens)
    return np.concatenate(
        [
            batches.pad([example], len(token_ids)).generated,
            stack([sequence], len(token_ids))["generated"],
        ]
    )


@pytest.mark.parametrize("kind", ANSWERS)
def test_every_token_has_the_channel_that_openai_harmony_reads_it_in(official, prompts, completions, oracle, kind):
    prompt, token_ids = prompts["open call"], np.array(prompts["open call"] + completions[kind])
    wanted = np.full(len(token_ids), Channel.other)
    start = len(prompt)
    for one in oracle["parsed"]["open call", kind][-len(ANSWERS[kind].parsed) :]:
        text = start + np.flatnonzero(token_ids[start : one["end"]] == MESSAGE)[0] + 1
        assert official.decode(token_ids[text : one["end"] - 1]) == one["text"]
        wanted[text : one["end"] - 1] = Channel[one["channel"]]
        start = one["end"]
    wanted[: len(prompt)] = Channel.prompt
    found = channels(channel_tokens(official), token_ids, len(prompt))
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("kind", ANSWERS)
def test_the_server_reads_answers_as_openai_harmony_does_preambles_as_content(official, completions, oracle, kind):
    prompt, whole = oracle["rendered"]["harmony", "low"], oracle["rendered"]["harmony", "answer", kind]
    wanted = {}
    for channel, recipient, text in ANSWERS[kind].parsed:
        name = "final" if channel == "commentary" else channel
        if recipient is not None:
            wanted[ToolChannel(0, recipient.removeprefix("functions."))] = text
        else:
            wanted[name] = f"{wanted[name]}\n{text}" if name in wanted else text
    for spelled in (completions[kind], whole[len(prompt) :]):  # by the model, and by openai-harmony
        reader, texts = chat_reader(official), {}
        pieces = [piece for token_id in spelled for piece in reader.push([token_id])] + list(
            reader.finish(cut_off=False)
        )
        for channel, piece in pieces:
            texts[channel] = texts.get(channel, "") + piece
        assert texts == wanted


def test_control_tokens_have_the_published_ids(official):
    assert stop_token_ids(official) == [200002, 200012, 199999]
    assert len(official) == 200019


def test_the_date_is_todays_when_none_is_given(official):
    text = official.decode(render_prompt(official, [USER], "low"))
    days = {datetime.date.today() - datetime.timedelta(days=back) for back in (0, 1)}  # midnight may pass in between
    assert any(f"\nCurrent date: {day.isoformat()}\n" in text for day in days)


def test_a_tool_that_the_official_template_cannot_write_is_refused(official):
    broken = {"n": {"type": "string", "enum": ["1"], "default": 1}}  # it joins the default of a choice as a text
    with pytest.raises(PipelineError, match="the chat template refuses the conversation: .*; change it"):
        render_prompt(official, [USER], "low", tools=[tool(properties=broken)], date=DATE)
