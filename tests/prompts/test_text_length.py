import random

import pytest
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers

from pipeline.prompts.chat_format import render_prompt
from pipeline.prompts.text_length import TextTooLong, longest_token
from tests.support.chatml import chatml_tokenizer
from tests.support.corpus_tokenizer import corpus_tokenizer

ALPHABET = "ab12 \n\t.,<|end|>=+-東é🏴"


def changed(part=None, **parts):
    """A tokenizer of our corpus, some parts of whose pipeline are others."""
    tokenizer = corpus_tokenizer(512)
    for name, value in parts.items():
        setattr(tokenizer.backend_tokenizer, name, value)
    if part is not None:
        tokenizer.add_tokens([part])
    return tokenizer


@pytest.mark.parametrize("make", [lambda: corpus_tokenizer(1500), chatml_tokenizer], ids=["corpus", "chatml"])
def test_no_text_has_fewer_tokens(make):
    tokenizer, draw = make(), random.Random(0)
    longest = longest_token(tokenizer)
    assert longest is not None
    pieces = [*ALPHABET, *map(tokenizer.decode, range(len(tokenizer)))]
    texts = ["".join(draw.choices(pieces, k=draw.randrange(60))) for _ in range(500)]
    texts += [tokenizer.decode([index]) * 9 for index in range(len(tokenizer))]
    counts = [len(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    assert all(count * longest >= len(text.encode()) for count, text in zip(counts, texts, strict=True))
    assert any(count * longest < 2 * len(text.encode()) for count, text in zip(counts, texts, strict=True) if text)


LEAVES_OUT_X = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex("x"), "removed"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"normalizer": normalizers.NFC()}, id="a normalizer"),
        pytest.param({"pre_tokenizer": pre_tokenizers.Whitespace()}, id="white space left out"),
        pytest.param({"pre_tokenizer": LEAVES_OUT_X}, id="pieces left out"),
        pytest.param({"pre_tokenizer": pre_tokenizers.Digits()}, id="not of bytes"),
        pytest.param({"part": AddedToken("<a>", lstrip=True)}, id="a token that takes the space before it"),
    ],
)
def test_nothing_is_certain_where_a_tokenizer_may_drop_text(change):
    assert longest_token(changed()) is not None
    assert longest_token(changed(**change)) is None


def test_a_prompt_that_is_too_long_is_not_encoded(monkeypatch):
    tokenizer = corpus_tokenizer(512)
    messages = [{"role": "user", "content": "x" * 100}]
    count = len(tokenizer.decode(render_prompt(tokenizer, messages, "low")))
    assert render_prompt(tokenizer, messages, "low", most_characters=count)
    monkeypatch.setattr(type(tokenizer), "encode", None)
    with pytest.raises(TextTooLong, match=f"has {count} characters; at most {count - 1} are encoded"):
        render_prompt(tokenizer, messages, "low", most_characters=count - 1)
