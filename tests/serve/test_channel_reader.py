"""Answers as GPT-OSS writes them, also oddly, streamed in pieces of any size."""

import random
import re

import pytest

from pipeline.prompts.harmony import render_completion
from pipeline.serve.channel_reader import ChannelReader, chat_reader
from pipeline.serve.text_stream import ANALYSIS, FINAL, ToolChannel
from tests.support.channels import split_channels
from tests.support.chatml import chatml_tokenizer

WHOLE = "<|channel|>analysis<|message|>2 + 2 = 4.<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>"
TEXTS = ["naïve café", "東京 is big", "👩‍👩‍👧 family 🎉", "a\n\n  b\t", "1 + 1 = 2"]
WEATHER, CITY = ToolChannel(0, "get_weather"), '{"city": "Rome"}'


def read(tokenizer, token_ids, sizes, *, cut_off):
    reader, texts, at = ChannelReader(tokenizer), {ANALYSIS: "", FINAL: ""}, 0
    while at < len(token_ids):
        size = sizes()
        for channel, text in reader.push(token_ids[at : at + size]):
            texts[channel] += text
        at += size
    for channel, text in reader.finish(cut_off=cut_off):
        texts[channel] += text
    return texts[ANALYSIS], texts[FINAL]


@pytest.mark.parametrize(
    ("text", "analysis", "final"),
    [
        (WHOLE, "2 + 2 = 4.", "4"),
        (WHOLE + "rest<|end|>", "2 + 2 = 4.", "4"),
        ("", "", ""),
        ("<|channel|>", "", ""),
        ("<|channel|>ana", "", ""),
        ("<|channel|>analysis<|message|>2 + 2", "2 + 2", ""),
        ("<|channel|>analysis<|message|>2 + 2 = 4.<|end|><|start|>assis", "2 + 2 = 4.", ""),
        ("<|channel|>final<|message|>yes<|call|>", "", "yes"),
        ("<|channel|>commentary to=x <|constrain|>json<|message|>{}<|call|>", "{}", ""),
        (
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b<|end|>",
            "a\nb",
            "",
        ),
        ("no header at all", "", "no header at all"),
        ("<|message|>no channel<|end|>after", "", "no channel\nafter"),
    ],
    ids=[
        "whole",
        "goes on after the stop",
        "empty",
        "channel alone",
        "cut in the channel",
        "cut in the analysis",
        "cut in the second header",
        "final at once",
        "commentary",
        "two analyses",
        "plain text",
        "no channel",
    ],
)
def test_completions_split_into_channels(tokenizer, text, analysis, final):
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    assert split_channels(tokenizer, token_ids) == (analysis, final)
    assert read(tokenizer, token_ids, lambda: 2, cut_off=True) == (analysis, final)


def test_a_completion_cut_off_anywhere_splits_into_beginnings_of_its_channels(tokenizer):
    analysis, final = "2 + 2 = 4, naïve.", "東京"
    token_ids = render_completion(tokenizer, analysis, final)
    for length in range(len(token_ids) + 1):
        found_analysis, found_final = split_channels(tokenizer, token_ids[:length])
        assert analysis.startswith(found_analysis)
        assert final.startswith(found_final)
    assert (found_analysis, found_final) == (analysis, final)


@pytest.mark.parametrize("analysis", TEXTS)
def test_channels_read_as_they_come_are_those_of_the_whole_wherever_it_is_cut(tokenizer, analysis):
    token_ids = render_completion(tokenizer, analysis, "東京: 42")
    for length in range(len(token_ids) + 1):
        cut = token_ids[:length]
        read_one_by_one = read(tokenizer, cut, lambda: 1, cut_off=length < len(token_ids))
        assert read_one_by_one == split_channels(tokenizer, cut)


def read_all(tokenizer, text, sizes, *, cut_off=False, tools=()):
    """The text of each channel, calls in their order."""
    token_ids = tokenizer.encode(text, add_special_tokens=False) if isinstance(text, str) else text
    reader, texts, at = ChannelReader(tokenizer, tools), {}, 0
    while at < len(token_ids):
        size = sizes()
        for channel, piece in reader.push(token_ids[at : at + size]):
            texts[channel] = texts.get(channel, "") + piece
        at += size
    for channel, piece in reader.finish(cut_off=cut_off):
        texts[channel] = texts.get(channel, "") + piece
    return texts


@pytest.mark.parametrize("size", [1, 2, 100])
@pytest.mark.parametrize(
    ("text", "texts"),
    [
        (
            "<|channel|>analysis<|message|>Look.<|end|><|start|>assistant<|channel|>commentary to=functions.add "
            '<|constrain|>json<|message|>{"é": 1}<|call|>',
            {ANALYSIS: "Look.", ToolChannel(0, "add"): '{"é": 1}'},
        ),
        ("<|channel|>commentary to=functions.add<|constrain|>json<|message|>{}<|call|>", {ToolChannel(0, "add"): "{}"}),
        ("<|channel|>analysis to=functions.add code<|message|>{}<|call|>", {ToolChannel(0, "add"): "{}"}),
        (
            " to=functions.add<|channel|>commentary <|constrain|>json<|message|>{}<|call|>",
            {ToolChannel(0, "add"): "{}"},
        ),
        (" to=functions.add<|message|>{}<|call|>", {ToolChannel(0, "add"): "{}"}),
        (
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant to=functions.add<|channel|>commentary json"
            "<|message|>{}<|call|>",
            {ANALYSIS: "a", ToolChannel(0, "add"): "{}"},
        ),
        ("<|channel|>commentary to=functions.add json<|message|><|call|>", {ToolChannel(0, "add"): ""}),
        (
            "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>commentary to=functions.a "
            "json<|message|>{}<|end|><|start|>assistant<|channel|>commentary to=functions.a json<|message|>[]<|call|>",
            {FINAL: "I look.", ToolChannel(0, "a"): "{}", ToolChannel(1, "a"): "[]"},
        ),
        (
            "<|start|>assistant to=functions.a<|start|>assistant<|channel|>final<|message|>b<|return|>",
            {FINAL: "b"},
        ),
        ("<|channel|>commentary to=browser.open<|message|>{}<|call|>", {ANALYSIS: "{}"}),
        (" to=functions and so on<|return|>", {FINAL: " to=functions and so on"}),
        (" to<|return|>", {FINAL: " to"}),
        (" to the end", {FINAL: " to the end"}),
    ],
    ids=[
        "behind the channel",
        "no space",
        "analysis",
        "behind the role, at once",
        "no channel",
        "behind the role",
        "no arguments",
        "preamble and two calls",
        "given up",
        "another recipient",
        "no recipient",
        "beginning of a recipient",
        "text",
    ],
)
def test_a_message_to_a_function_is_a_call_wherever_its_header_names_it(tokenizer, text, texts, size):
    assert read_all(tokenizer, text, lambda: size) == texts


def test_an_answer_cut_off_in_the_header_of_a_call_has_no_text(tokenizer):
    for text in (" to=functions.add", "<|channel|>commentary to=functions.add", "<|start|>assistant to=functions.add"):
        assert "".join(read_all(tokenizer, text, lambda: 1, cut_off=True).values()) == ""


def test_an_answer_in_a_format_without_channels_is_all_final(tokenizer):
    words = chatml_tokenizer()
    reader = chat_reader(words)
    token_ids = words.encode("naïve 東京<gh_stars> ok<|im_end|>")
    pieces = [piece for token_id in token_ids for piece in reader.push([token_id])] + list(reader.finish(cut_off=False))
    assert {channel for channel, _ in pieces} == {FINAL}
    assert "".join(text for _, text in pieces) == "naïve 東京 ok"
    assert isinstance(chat_reader(tokenizer), ChannelReader)


# what public reports say that servers of gpt-oss receive (harmony #38 and #60, vLLM #22519 to #57099), with get_weather
# and get_time offered
ODD = {
    "behind the channel": (
        f"<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{CITY}<|call|>",
        {WEATHER: CITY},
    ),
    "behind the role": (
        f" to=functions.get_weather<|channel|>commentary <|constrain|>json<|message|>{CITY}<|call|>",
        {WEATHER: CITY},
    ),
    "a type of its own": (
        f"<|channel|>commentary to=functions.get_weather code<|message|>{CITY}<|call|>",
        {WEATHER: CITY},
    ),
    "the channel twice": (
        f"<|channel|>commentary<|channel|>commentary to=functions.get_weather json<|message|>{CITY}<|call|>",
        {WEATHER: CITY},
    ),
    "no functions.": (
        f"<|channel|>commentary to=get_weather <|constrain|>json<|message|>{CITY}<|call|>",
        {WEATHER: CITY},
    ),
    "a type glued to the name": (
        f"<|channel|>commentary to=functions.get_weatherjson<|message|>{CITY}<|call|>",
        {WEATHER: CITY},
    ),
    "a tool that is not there": (
        "<|channel|>analysis to=python code<|message|>print(1)<|call|>",
        {ANALYSIS: "print(1)"},
    ),
    "parallel calls": (
        '<|channel|>commentary to=multi_tool_use.parallel json<|message|>{"tool_uses": [{"recipient_name": '
        '"functions.get_weather", "parameters": {"city": "Rome"}}, {"recipient_name": "functions.get_time", '
        '"parameters": {}}]}<|call|>',
        {WEATHER: CITY, ToolChannel(1, "get_time"): "{}"},
    ),
    "parallel calls of others": (
        "<|channel|>commentary to=multi_tool_use.parallel json<|message|>"
        '{"tool_uses": [{"recipient_name": "x"}]}<|call|>',
        {ANALYSIS: '{"tool_uses": [{"recipient_name": "x"}]}'},
    ),
    "parallel calls, broken": (
        "<|channel|>commentary to=multi_tool_use.parallel json<|message|>nothing<|call|>",
        {ANALYSIS: "nothing"},
    ),
    "final without a message": ("<|channel|>final Hello there<|return|>", {FINAL: "Hello there"}),
    "analysis without a message": (
        "<|channel|>analysis think<|end|><|start|>assistant<|channel|>final<|message|>hi<|return|>",
        {ANALYSIS: "think", FINAL: "hi"},
    ),
    "a call without a message": (
        f"<|channel|>commentary to=functions.get_weather json {CITY}<|call|>",
        {WEATHER: CITY},
    ),
    "no start": (
        "<|channel|>analysis<|message|>a<|end|>assistant<|channel|>final<|message|>hi<|return|>",
        {ANALYSIS: "a", FINAL: "hi"},
    ),
    "another role": ("<|channel|>final<|message|>hi<|end|><|start|>user<|message|>next", {FINAL: "hi"}),
    "a preamble": (
        "<|channel|>commentary<|message|>I will look.<|end|><|start|>assistant<|channel|>commentary "
        f"to=functions.get_weather json<|message|>{CITY}<|call|>",
        {FINAL: "I will look.", WEATHER: CITY},
    ),
    "another case": ("<|channel|>Final<|message|>x<|return|>", {FINAL: "x"}),
    "an unknown channel": ("<|channel|>comment<|message|>x<|return|>", {ANALYSIS: "x"}),
}


@pytest.mark.parametrize("size", [1, 2, 8, 1000])
@pytest.mark.parametrize("name", ODD)
def test_an_odd_answer_loses_no_text_and_shows_no_header(tokenizer, name, size):
    text, texts = ODD[name]
    assert read_all(tokenizer, text, lambda: size, tools=("get_weather", "get_time")) == texts


@pytest.mark.parametrize("name", ODD)
def test_an_odd_answer_cut_off_anywhere_gives_no_header(tokenizer, name):
    token_ids = tokenizer.encode(ODD[name][0], add_special_tokens=False)
    for length in range(len(token_ids)):
        texts = read_all(tokenizer, token_ids[:length], lambda: 1, cut_off=True, tools=("get_weather", "get_time"))
        shown = "".join(texts.values())
        assert not re.search(r"<\||functions\.|to=|assistant", shown.replace('"functions.', ""))


def test_another_roles_turn_ends_the_answer(tokenizer):
    reader = ChannelReader(tokenizer)
    list(reader.push(tokenizer.encode(ODD["another role"][0], add_special_tokens=False)))
    assert reader.has_left_turn
    reader = ChannelReader(tokenizer)
    list(reader.push(tokenizer.encode(WHOLE, add_special_tokens=False)))
    assert not reader.has_left_turn


def bodies_in(tokenizer, token_ids):
    """What stands between `<|message|>` and the next control token, up to a stop token or a turn that is begun."""
    found, body = [], None
    names = tokenizer.convert_ids_to_tokens(token_ids)
    for token_id, name in zip(token_ids, names, strict=True):
        if name in ("<|return|>", "<|call|>", "<|start|>"):
            break
        if name.startswith("<|"):
            body = [] if name == "<|message|>" else None
            if body is not None:
                found.append(body)
        elif body is not None:
            body.append(token_id)
    return [tokenizer.decode(body) for body in found]


def test_any_mixture_of_tokens_is_read_alike_in_pieces_and_at_once(tokenizer):
    draw = random.Random(0)
    control = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|constrain|>", "<|return|>", "<|call|>"]
    special = tokenizer.convert_tokens_to_ids(control)
    words = tokenizer.encode(
        'assistant user final analysis commentary to=functions.get_weather json {"a": 1} plain',
        add_special_tokens=False,
    )
    for _ in range(10_000):
        token_ids = draw.choices(special[:5] * 4 + words * 2 + special[5:], k=draw.randrange(24))
        tools = ("get_weather",) if draw.random() < 0.5 else ()
        cut_off = not set(token_ids) & set(special[5:])
        whole = read_all(tokenizer, token_ids, lambda: 1000, cut_off=cut_off, tools=tools)
        pieces = read_all(tokenizer, token_ids, lambda: draw.randrange(1, 4), cut_off=cut_off, tools=tools)
        assert pieces == whole, tokenizer.decode(token_ids)
        shown = "".join(whole.values())
        assert "<|" not in shown, tokenizer.decode(token_ids)
        for body in bodies_in(tokenizer, token_ids):
            assert body in shown, tokenizer.decode(token_ids)
