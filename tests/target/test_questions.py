"""What a target is trained on and what it is asked: the same for a seed, and never the same question."""

import collections
import itertools

import pytest

from pipeline.errors import PipelineError
from pipeline.prompts import corpus, sources
from pipeline.prompts.split import is_heldout
from pipeline.target import questions


def test_no_question_that_is_held_out_is_trained_on():
    trained = {each.prompt for each in questions.training_conversations(0, 4_000)}
    asked = [each.prompt for each in questions.held_out_conversations(0, 15)]
    assert len(set(asked)) == len(asked)
    assert not trained & set(asked)


def test_every_family_is_asked_as_often():
    asked = collections.Counter(each.family for each in questions.held_out_conversations(0, 7))
    assert asked == {family.__name__: 7 for family in corpus.FAMILIES}


def test_what_a_drafts_training_holds_out_by_default_is_held_out_here_too():
    prompts = sources.generated(0, 2000, "low").prompts
    held_out = {prompt.messages[0].content for prompt in prompts if is_heldout(prompt.prompt_id, 1 / 32)}
    trained = {each.prompt for each in questions.training_conversations(0, 4_000)}
    assert len(held_out) > 40
    assert not held_out & trained
    assert trained & {prompt.messages[0].content for prompt in prompts}  # the others may be


def test_a_seed_gives_the_same_conversations_and_another_seed_others():
    first, again, other = (list(itertools.islice(questions.training_conversations(seed, 50), 50)) for seed in (3, 3, 4))
    assert first == again
    assert first != other
    assert questions.held_out_conversations(3, 2) == questions.held_out_conversations(3, 2)


def test_more_questions_than_a_family_has_are_refused(monkeypatch):
    monkeypatch.setattr(questions, "MAX_HELD_OUT", 100)
    with pytest.raises(
        PipelineError, match="the family \\w+ has \\d+ questions that are held out; 1000 of each are wanted"
    ):
        questions.held_out_conversations(0, 1000)
