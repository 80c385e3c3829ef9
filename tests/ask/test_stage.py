"""The whole stage on a random target and draft: what it prints is what plain greedy decoding gives."""

import re

import pytest

from pipeline.ask import stage
from pipeline.config.choices import ServeMode
from pipeline.engine.config import EngineConfig
from pipeline.engine.engine import Engine
from pipeline.engine.request import Request
from pipeline.errors import PipelineError
from pipeline.model.gpt_oss.weights import WeightFormat
from pipeline.model.hf.directory import read_target
from pipeline.prompts.chat_format import render_prompt, stop_token_ids
from pipeline.workspace.workspace import Workspace
from tests.support.corpus_tokenizer import corpus_tokenizer
from tests.support.recorder import Recorder
from tests.support.served import random_pair

pytestmark = pytest.mark.usefixtures("compiled_quickly")

QUESTIONS = ["What is 17 + 25?", "Sort 5, 2, 9."]
LENGTH = 20


@pytest.fixture(scope="module")
def tokenizer():
    return corpus_tokenizer(600)


@pytest.fixture
def config(tmp_path_factory, tokenizer):
    config = random_pair(tmp_path_factory.mktemp("asked"), tokenizer)
    config.ask.questions, config.ask.max_new_tokens = list(QUESTIONS), LENGTH
    return config


def greedy(config, tokenizer):
    """The number of tokens of each answer by plain decoding."""
    target = read_target(Workspace(config).target.path, WeightFormat())
    stops = tuple(stop_token_ids(tokenizer))
    engine = Engine(target, None, EngineConfig(num_slots=2, max_length=96, prefill_chunk=16, stop_token_ids=stops))
    requests = [
        Request(
            request_id=question,
            prompt_ids=tuple(render_prompt(tokenizer, [{"role": "user", "content": question}], "low")),
            max_new_tokens=LENGTH,
        )
        for question in QUESTIONS
    ]
    return {answer.request_id: len(answer.token_ids) for answer in engine.generate(requests)}


def test_every_question_is_shown_with_its_answer_and_the_tokens_of_its_rounds(config, tokenizer, capsys):
    tracker = Recorder()
    stage.run(config, tracker)
    shown = dict(re.findall(r"question +(.+)\n(?:.*\n)*?tokens +(.+)\n", capsys.readouterr().out))
    assert shown.keys() == set(QUESTIONS)
    for question, num_tokens in greedy(config, tokenizer).items():
        numbers = re.fullmatch(r"(\d+) in (\d+) rounds, ([\d.]+) a round of at most 5", shown[question])
        tokens, rounds, mean = numbers.groups()
        assert int(tokens) == num_tokens
        assert float(mean) == pytest.approx((num_tokens - 1) / int(rounds), abs=0.05)
    assert tracker.documents["replies.json"].keys() == set(QUESTIONS)


def test_the_plain_arm_has_no_rounds(config, tokenizer, capsys):
    config.serve.mode = ServeMode.plain
    stage.run(config, Recorder())
    shown = re.findall(r"tokens +(\d+), one a step", capsys.readouterr().out)
    assert list(map(int, shown)) == list(greedy(config, tokenizer).values())


def test_a_question_that_does_not_fit_is_one_error_and_the_server_ends(config):
    config.ask.questions = ["What is 17 + 25? " * 20]
    with pytest.raises(PipelineError, match="gives no answer to 'What is 17"):
        stage.run(config, Recorder())
