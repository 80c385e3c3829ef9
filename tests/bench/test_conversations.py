"""Questions of several turns: a later turn holds the answers to the ones before."""

import pytest

from pipeline.bench.conversations import final_text, prompts_of
from pipeline.prompts.benchmarks import Question
from pipeline.prompts.harmony import render_completion
from tests.support.corpus_tokenizer import corpus_tokenizer

QUESTIONS = [
    Question(set_name="mt-bench", turns=("a", "b", "c")),
    Question(set_name="gsm8k", turns=("d",)),
    Question(set_name="mt-bench", turns=("e", "f")),
]


def said(prompt):
    return [(message.role, message.content) for message in prompt.messages]


def test_each_turn_is_a_prompt_that_holds_the_answers_before_it():
    asked = []

    def answers(prompts):
        asked.append([said(one)[-1][1] for one in prompts])
        return [f"answer to {said(one)[-1][1]}" for one in prompts]

    found = prompts_of(QUESTIONS, "low", answers)
    first, second, third = ("user", "a"), ("assistant", "answer to a"), ("user", "b")
    assert [said(one) for one in found] == [
        [first],
        [first, second, third],
        [first, second, third, ("assistant", "answer to b"), ("user", "c")],
        [("user", "d")],
        [("user", "e")],
        [("user", "e"), ("assistant", "answer to e"), ("user", "f")],
    ]
    assert asked == [["a", "e"], ["b"]]  # the last turn's answers are the benchmark's own
    assert [one.family for one in found] == [
        *("mt-bench", "mt-bench turn 2", "mt-bench turn 3", "gsm8k", "mt-bench", "mt-bench turn 2")
    ]
    assert {one.effort for one in found} == {"low"}


def test_a_conversation_ends_where_the_target_says_nothing(caplog):
    found = prompts_of(QUESTIONS, "low", lambda prompts: ["" if said(one)[-1][1] == "a" else "yes" for one in prompts])
    assert [said(one)[-1][1] for one in found] == ["a", "d", "e", "f"]
    assert "1 of 2 conversations end after turn 1" in caplog.text


def test_questions_of_one_turn_ask_the_target_nothing():
    def answers(prompts):
        raise AssertionError("asked")

    assert len(prompts_of(QUESTIONS[1:2], "high", answers)) == 1
    assert prompts_of([], "high", answers) == []


@pytest.mark.parametrize("analysis", [None, "Let me think."])
def test_what_is_final_in_an_answer_is_its_text(analysis):
    tokenizer = corpus_tokenizer(64)
    assert final_text(render_completion(tokenizer, analysis, "It is 5."), tokenizer) == "It is 5."
    assert final_text(render_completion(tokenizer, "Let me think.", "")[:-3], tokenizer) == ""
