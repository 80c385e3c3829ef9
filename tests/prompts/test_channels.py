"""Channels by hand-made conversations, and by the text that the reference reader finds in each."""

import numpy as np
import pytest

from pipeline.prompts import corpus
from pipeline.prompts.channels import Channel, ChannelTokens, channel_tokens, channels
from pipeline.prompts.tokenizer import train_tokenizer
from tests.support import channels as reference
from tests.support.chatml import chatml_tokenizer

PROMPT = "<|start|>system<|message|>Reasoning: low<|end|><|start|>user<|message|>count<|end|><|start|>assistant"
WORDS = ["commentary to functions count one two three json"] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([*WORDS, *(corpus.conversation(0, index, "low").prompt for index in range(200))], 400)


def spoken(tokenizer, *pieces):
    """The channels of a text given as pieces: (text, the channel that each of its tokens must have)."""
    prompt = tokenizer.encode(PROMPT, add_special_tokens=False)
    parts = [tokenizer.encode(text, add_special_tokens=False) for text, _ in pieces]
    token_ids = np.array([*prompt, *(token for part in parts for token in part)], np.int32)
    wanted = [Channel.prompt] * len(prompt)
    for part, (_, channel) in zip(parts, pieces, strict=True):
        wanted += [channel] * len(part)
    return channels(channel_tokens(tokenizer), token_ids, len(prompt)).tolist(), wanted


ANALYSIS = [
    ("<|channel|>analysis<|message|>", Channel.other),
    ("one two", Channel.analysis),
    ("<|end|>", Channel.other),
]
FINAL = [("<|start|>assistant<|channel|>final<|message|>", Channel.other), ("three", Channel.final)]


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param([*ANALYSIS, *FINAL, ("<|return|>", Channel.other)], id="analysis and final"),
        pytest.param([*ANALYSIS, *FINAL], id="cut off in the final text"),
        pytest.param([*ANALYSIS, ("<|start|>assistant<|chan", Channel.other)], id="cut off in a header"),
        pytest.param(
            [
                *ANALYSIS,
                ("<|start|>assistant<|channel|>commentary to=functions.count <|constrain|>json", Channel.other),
                ("<|message|>", Channel.other),
                ('{"n": 3}', Channel.commentary),
                ("<|call|>", Channel.other),
            ],
            id="a call of a tool",
        ),
        pytest.param(
            [(" to=functions.count<|channel|>commentary<|message|>", Channel.other), ("one", Channel.commentary)],
            id="the recipient before the channel",
        ),
        pytest.param([("<|message|>", Channel.other), ("one", Channel.final)], id="no channel named"),
        pytest.param([("<|channel|>poetry<|message|>", Channel.other), ("one", Channel.other)], id="no such channel"),
        pytest.param([*ANALYSIS, ("two", Channel.other), *FINAL], id="text between messages"),
        pytest.param(
            [*ANALYSIS, ("<|start|>assistant<|message|>", Channel.other), ("one", Channel.final)],
            id="a channel ends with its message",
        ),
    ],
)
def test_every_token_has_the_channel_of_its_message(tokenizer, pieces):
    found, wanted = spoken(tokenizer, *pieces)
    assert found == wanted


def test_the_tokens_of_a_channel_are_the_text_that_the_reference_reader_finds(tokenizer):
    answer = tokenizer.encode("".join(text for text, _ in [*ANALYSIS, *FINAL]) + "<|return|>", add_special_tokens=False)
    prompt = tokenizer.encode(PROMPT, add_special_tokens=False)
    token_ids = np.array([*prompt, *answer], np.int32)
    found = channels(channel_tokens(tokenizer), token_ids, len(prompt))
    texts = [tokenizer.decode(token_ids[found == channel]) for channel in (Channel.analysis, Channel.final)]
    assert texts == list(reference.split_channels(tokenizer, answer)) == ["one two", "three"]


def test_what_the_prompt_says_is_prompt(tokenizer):
    prompt = tokenizer.encode(f"{PROMPT}<|channel|>final<|message|>one<|end|><|start|>assistant")
    assert set(channels(channel_tokens(tokenizer), np.array(prompt, np.int32), len(prompt)).tolist()) == {0}


def test_without_channels_in_the_format_all_but_its_ends_is_final():
    tokenizer = chatml_tokenizer()
    prompt = tokenizer.encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)
    answer = tokenizer.encode("hello there<|im_end|>", add_special_tokens=False)
    found = channels(channel_tokens(tokenizer), np.array([*prompt, *answer], np.int32), len(prompt)).tolist()
    assert found == [0] * len(prompt) + [Channel.final] * (len(answer) - 1) + [Channel.other]


def test_an_answer_cut_off_before_its_end_is_final_whether_its_prompt_has_an_end_or_not():
    tokens = channel_tokens(chatml_tokenizer())
    assert channels(tokens, np.array([1, 2, 3], np.int32), 1).tolist() == [0, Channel.final, Channel.final]
    assert channels(tokens, np.array([], np.int32), 0).tolist() == []


def test_the_published_ids_of_an_answer_are_read_as_openai_harmony_reads_them():
    """Ids of docs/dflash.md#mask-token, which openai-harmony parses into an analysis and a final text."""
    tokens = ChannelTokens(
        start=200006,
        channel=200005,
        message=200008,
        ends=(200007, 200002, 200012, 199999),
        names=((35644,), (12606, 815), (17196,)),
    )
    answer = [200005, 35644, 200008, 17958, 5856, 13, 200007, 200006, 173781, 200005, 17196, 200008, 19, 200002]
    found = channels(tokens, np.array(answer, np.int32), 0).tolist()
    other, analysis, final = Channel.other, Channel.analysis, Channel.final
    assert found == [*[other] * 3, *[analysis] * 3, *[other] * 6, final, other]
