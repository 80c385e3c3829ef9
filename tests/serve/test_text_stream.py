import random

import pytest

from pipeline.prompts.harmony import render_completion
from pipeline.serve.text_stream import (
    ANALYSIS,
    FINAL,
    ChannelReader,
    Detokenizer,
    StopStrings,
    ToolChannel,
    chat_reader,
)
from tests.support.channels import split_channels
from tests.support.chatml import chatml_tokenizer

WHOLE = "<|channel|>analysis<|message|>2 + 2 = 4.<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>"
TEXTS = ["naïve café", "東京 is big", "👩‍👩‍👧 family 🎉", "a\n\n  b\t", "1 + 1 = 2"]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_of_text_are_whole_characters_and_add_up(tokenizer, text):
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push([token_id]) for token_id in tokenizer.encode(text, add_special_tokens=False)]
    assert "".join(pieces) + detokenizer.flush() == text
    assert "\ufffd" not in "".join(pieces)


def test_text_is_returned_as_soon_as_it_is_certain(tokenizer):
    detokenizer = Detokenizer(tokenizer)
    first, *rest = tokenizer.encode("é", add_special_tokens=False)
    assert detokenizer.push([*tokenizer.encode("ab", add_special_tokens=False), first]) == "ab"
    assert detokenizer.push(rest) == "é"


def test_bytes_that_are_no_character_are_shown_once_something_follows(tokenizer):
    broken = tokenizer.encode("é", add_special_tokens=False)[:1]
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.push(broken * 5) == ""
    assert detokenizer.push(tokenizer.encode("a", add_special_tokens=False)) == "\ufffd" * 5 + "a"
    assert detokenizer.push(broken) == ""
    assert detokenizer.flush() == "\ufffd"


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


def test_channels_of_any_tokens_are_those_of_the_whole(tokenizer):
    draw = random.Random(0)
    special = tokenizer.convert_tokens_to_ids(
        ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|constrain|>", "<|return|>"]
    )
    words = tokenizer.encode("final analysis commentary é 東 a b", add_special_tokens=False)
    for _ in range(400):
        token_ids = draw.choices(special[:5] * 2 + words * 2 + special[5:], k=draw.randrange(20))
        cut_off = special[5] not in token_ids
        found = read(tokenizer, token_ids, lambda: draw.randrange(1, 4), cut_off=cut_off)
        assert found == split_channels(tokenizer, token_ids), tokenizer.decode(token_ids)


def read_all(tokenizer, text, sizes, *, cut_off=False):
    """The text of each channel, calls in their order."""
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    reader, texts, at = ChannelReader(tokenizer), {}, 0
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
            {ANALYSIS: "I look.", ToolChannel(0, "a"): "{}", ToolChannel(1, "a"): "[]"},
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


@pytest.mark.parametrize(
    ("stops", "pieces", "shown", "found"),
    [
        (["END"], ["ab", "EN", "D", "x"], ["ab", "", "", ""], True),
        (["END"], ["abE", "Nx"], ["ab", "ENx"], False),
        (["\n\n"], ["a\n", "b\n\nc"], ["a", "\nb"], True),
        (["aab"], ["aa", "ab"], ["", "a"], True),
        (["xyz", "b"], ["ab", "c"], ["a", ""], True),
        (["bc", "abcd"], ["abcd"], [""], True),
    ],
    ids=["over pieces", "false start", "line", "overlapping itself", "two", "earliest start"],
)
def test_a_text_ends_before_its_first_stop_string(stops, pieces, shown, found):
    matcher = StopStrings(stops)
    assert [matcher.push(piece) for piece in pieces] == shown
    assert matcher.found is found


def test_what_only_began_like_a_stop_string_is_returned_at_the_end():
    matcher = StopStrings(["END"])
    assert matcher.push("the EN") + matcher.flush() == "the EN"
