import re
import statistics
import subprocess
import sys

import pytest

from pipeline.errors import PipelineError
from pipeline.prompts.chat_format import render_prompt
from pipeline.prompts.corpus import FAMILIES, conversation
from pipeline.prompts.harmony import render_completion


def test_a_conversation_is_a_function_of_seed_and_index():
    assert [conversation(3, i) for i in range(50)] == [conversation(3, i) for i in range(50)]
    assert [conversation(3, i) for i in range(50)] != [conversation(4, i) for i in range(50)]


def test_another_process_with_another_hash_seed_writes_the_same_corpus():
    code = "from pipeline.prompts.corpus import conversation; print([conversation(3, i) for i in range(50)])"
    environment = {"PYTHONHASHSEED": "77", "PYTHONPATH": ":".join(filter(None, sys.path))}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert answer.stdout.strip() == str([conversation(3, i) for i in range(50)])


def test_effort_changes_the_analysis_alone_and_makes_it_longer():
    for index in range(200):
        low, medium, high = (conversation(0, index, effort) for effort in ("low", "medium", "high"))
        assert {(each.prompt, each.final) for each in (low, medium, high)} == {(low.prompt, low.final)}
        assert len(low.analysis) < len(medium.analysis) < len(high.analysis)


def test_without_an_effort_all_three_are_drawn_and_one_that_is_given_changes_nothing_else():
    drawn = [conversation(0, index) for index in range(200)]
    assert {each.effort for each in drawn} == {"low", "medium", "high"}
    assert drawn == [conversation(0, index, each.effort) for index, each in enumerate(drawn)]


def test_an_unknown_effort_is_refused():
    with pytest.raises(PipelineError, match="'huge'; wanted one of low, medium, high"):
        conversation(0, 0, "huge")


def test_twenty_thousand_draws_hold_many_distinct_prompts_and_many_patterns():
    prompts = {conversation(0, index).prompt for index in range(20_000)}
    assert len(prompts) > 15_000
    names = r"\b(Ann|Ben|Tom|Mia|Sam|Eva|Leo|Zoe|cups|pens|keys|eggs|books|cards|coins|apples|\w+day)\b"
    patterns = {re.sub(r"\d+(, \d+)*|\b(red|blue|green|black|white)\b|" + names, "_", text) for text in prompts}
    assert len(patterns) > 300


def test_the_same_prompt_at_the_same_effort_always_gets_the_same_answer():
    answers: dict[str, set[tuple[str, str]]] = {}
    for index in range(20_000):
        each = conversation(0, index, "low")
        answers.setdefault(each.prompt, set()).add((each.analysis, each.final))
    assert all(len(found) == 1 for found in answers.values())


def test_conversations_are_short_enough_for_a_tiny_model(tokenizer):
    prompts, completions = [], []
    for index in range(400):
        each = conversation(1, index, "low")
        prompts.append(len(render_prompt(tokenizer, [{"role": "user", "content": each.prompt}], "low")))
        completions.append(len(render_completion(tokenizer, each.analysis, each.final)))
    assert 20 < statistics.mean(prompts) < 45
    assert 40 < statistics.mean(completions) < 80
    assert max(p + c for p, c in zip(prompts, completions, strict=True)) <= 192


def test_every_sum_and_product_that_is_written_is_right():
    for index in range(3_000):
        each = conversation(2, index, "high")
        text = each.analysis + " " + each.final
        for left, right in re.findall(r"(\d+(?: [-+x] \d+)+) = (\d+)", text):
            assert eval(left.replace("x", "*")) == int(right), text


def test_every_function_that_is_written_is_python():
    found = 0
    for index in range(2_000):
        for code in re.findall(r"```python\n(.*?)```", conversation(2, index).final, re.DOTALL):
            compile(code, "answer", "exec")
            found += 1
    assert found > 100


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_every_family_varies_its_questions_and_fills_every_slot(family):
    import random

    exchanges = [family(random.Random(f"test/{index}")) for index in range(200)]
    assert len({each.question for each in exchanges}) > 50
    assert len({each.answer for each in exchanges}) > 15
    for each in exchanges:
        assert all((each.question, each.plan, each.steps, each.check, each.answer))
