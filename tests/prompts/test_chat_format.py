import copy

import pytest

from pipeline.artifacts import PipelineError
from pipeline.prompts.chat_format import render_prompt, stop_token_ids
from pipeline.prompts.harmony import render_completion

USER = {"role": "user", "content": "What is 2 + 2?"}


def test_a_prompt_ends_where_the_assistant_begins(tokenizer):
    assert tokenizer.decode(render_prompt(tokenizer, [USER], "high")) == (
        "<|start|>system<|message|>Reasoning: high<|end|>"
        "<|start|>user<|message|>What is 2 + 2?<|end|><|start|>assistant"
    )


def test_prompt_and_completion_are_the_tokens_of_the_whole_conversation(tokenizer):
    reply = {"role": "assistant", "content": "4", "thinking": "2 + 2 = 4."}
    whole = tokenizer.apply_chat_template([USER, reply], tokenize=True, return_dict=False, reasoning_effort="low")
    assert render_prompt(tokenizer, [USER], "low") + render_completion(tokenizer, "2 + 2 = 4.", "4") == whole


def test_control_tokens_are_one_token_each(tokenizer):
    tokens = tokenizer.convert_ids_to_tokens(render_completion(tokenizer, "a", "b"))
    assert tokens == [
        "<|channel|>",
        "analysis",
        "<|message|>",
        "a",
        "<|end|>",
        "<|start|>",
        "assistant",
        "<|channel|>",
        "final",
        "<|message|>",
        "b",
        "<|return|>",
    ]


def test_a_date_stands_in_for_today_in_templates_that_print_one(tokenizer):
    dated = copy.deepcopy(tokenizer)
    dated.chat_template = (
        '{%- macro system() %}{{ "Current date: " + strftime_now("%Y-%m-%d") }}{% endmacro -%}'
        "{{ system() }} {{ messages[0].content }}"
    )
    frozen = tokenizer.decode(render_prompt(dated, [USER], "low", date="2025-08-05"))
    assert frozen == "Current date: 2025-08-05 What is 2 + 2?"
    assert "2025-08-05" not in tokenizer.decode(render_prompt(dated, [USER], "low"))


def test_stop_tokens_are_return_call_and_endoftext(tokenizer):
    assert tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer)) == [
        "<|return|>",
        "<|call|>",
        "<|endoftext|>",
    ]


@pytest.mark.parametrize(
    ("messages", "effort", "message"),
    [
        ([USER], "max", "'max'; wanted one of low, medium, high"),
        ([], "low", "wanted a non-empty list"),
        ([{"role": "tool", "content": "x"}, USER], "low", r"messages\[0\] has role 'tool'; wanted one of"),
        ([USER, {"role": "developer", "content": "x"}, USER], "low", r"messages\[1\].*first message only"),
        ([USER, {"role": "assistant", "content": "x"}], "low", "wanted the user's"),
        (
            [{"role": "user", "content": "a<|end|>b"}],
            "low",
            r"spells the control tokens <\|end\|>; .* take them out",
        ),
    ],
    ids=["effort", "no messages", "role", "late instructions", "assistant last", "control token"],
)
def test_what_is_no_prompt_is_refused(tokenizer, messages, effort, message):
    with pytest.raises(PipelineError, match=message):
        render_prompt(tokenizer, messages, effort)


def test_a_template_that_refuses_the_messages_is_reported_with_its_reason(tokenizer):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = '{{ raise_exception("no way") }}'
    with pytest.raises(PipelineError, match="refuses the messages: no way"):
        render_prompt(strict, [USER], "low")
