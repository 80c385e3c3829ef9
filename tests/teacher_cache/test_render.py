"""Prompts of a split as tokens: usable, or skipped with the reason."""

import pytest

from pipeline.errors import PipelineError
from pipeline.prompts.messages import Message
from pipeline.prompts.sources import prompt_of
from pipeline.prompts.tools import Tool
from pipeline.teacher_cache.render import render_prompts
from tests.support.chatml import chatml_tokenizer

DATE = "2025-08-05"


@pytest.fixture
def tokenizer():
    """One token a byte, and a template that prints the day."""
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%Y-%m-%d') }} {{ messages[0].content }}"
    return tokenizer


def test_prompts_are_rendered_on_the_day_asked_for_and_unusable_ones_say_why(tokenizer):
    asked = [Message("user", "Hi")]
    prompts = [
        prompt_of(asked, "low"),
        prompt_of([Message("user", "x" * 50)], "low"),
        prompt_of([Message("user", "a<|im_end|>")], "low"),
        prompt_of(asked, "low", [Tool("f", "D.")]),
    ]
    rows = render_prompts(tokenizer, prompts, 40, "train", date=DATE)
    assert [row.prompt for row in rows] == prompts
    assert tokenizer.decode(rows[0].token_ids) == f"{DATE} Hi"
    skipped = [row.skipped for row in rows]
    assert skipped[:3] == [None, "61 tokens, at most 40 are wanted", None]
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in rows[2].token_ids
    assert "chat format has no tools" in skipped[3]


def test_a_split_without_a_usable_prompt_is_refused_with_the_reasons(tokenizer):
    prompts = [prompt_of([Message("user", "x" * 50)], "low")]
    with pytest.raises(PipelineError, match=r"none of the 1 heldout prompts .*\n .*61 tokens, at most 40"):
        render_prompts(tokenizer, prompts, 40, "heldout", date=DATE)
