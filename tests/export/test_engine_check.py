"""The exported draft in the engine beside the training evaluation, on texts that greedy decoding writes or does not."""

import dataclasses

import numpy as np
import pytest
import tiny_loop
import tiny_training
from faulty_training import Trained

from pipeline.artifacts import PipelineError
from pipeline.dflash import scored
from pipeline.dflash.acceptance import Acceptance
from pipeline.export.trial import Trial, require_agreement, run_trial
from pipeline.model import checkpoints
from pipeline.model.gpt_oss_weights import WeightsForm
from pipeline.prompts.chat_format import stop_token_ids
from pipeline.prompts.tokenizer import load_tokenizer
from pipeline.serve.engine import Draft
from pipeline.teacher_cache import store
from pipeline.teacher_cache.capture import capture
from pipeline.train.evaluate import evaluate

NUM_SAMPLED = 12


@pytest.fixture(scope="module")
def trained():
    return Trained.read()


@pytest.fixture(scope="module")
def target(trained):
    return checkpoints.load_target(trained.target.path, WeightsForm())


def tried(trained, target, texts):
    model, weights = target
    return run_trial(
        weights,
        model,
        Draft(trained.weights, trained.sizes),
        texts,
        stop_token_ids=stop_token_ids(load_tokenizer(trained.target.path)),
        slots=5,
        prefill_chunk=tiny_loop.configuration(trained.target.path).serve.prefill_chunk,
    )


def sampled(texts, vocab_size):
    """The same prompts with answers that no greedy decoding writes, some of them short."""
    random = np.random.default_rng(0)
    found = []
    for number, text in enumerate(texts):
        answer = np.array(text.answer_ids)[: 2 + 7 * (number % 4)]
        other = random.random(len(answer)) < 0.2
        other[0] = True
        answer[other] = (answer[other] + random.integers(1, vocab_size, other.sum())) % vocab_size
        found.append(tuple(answer.tolist()))
    return found


def test_the_engine_goes_along_texts_that_it_would_not_write_as_the_training_evaluation_does(trained, target, tmp_path):
    model, weights = target
    greedy = trained.texts[:NUM_SAMPLED]
    rows = [text.prompt_ids + answer for text, answer in zip(greedy, sampled(greedy, model.vocab_size), strict=True)]
    captured = dict(capture(weights, model, trained.sizes.tapped_layers, rows))
    sequences = [
        store.CachedSequence(
            token_ids=np.array(row, np.int32),
            channels=np.zeros(len(row), np.uint8),
            prompt_tokens=text.prompt_tokens,
            features=captured[index].features,
        )
        for index, (row, text) in enumerate(zip(rows, greedy, strict=True))
    ]
    shards = tiny_training.write_split(tmp_path, "heldout", sequences)
    layout = tiny_training.layout_of(trained.sizes.feature_size)
    store.write_header(tmp_path, layout, {"train": 0, "heldout": shards})
    split = store.open_split(tmp_path, "heldout")
    texts = evaluate(trained.weights, trained.sizes, weights.embedding, weights.head, split).texts
    assert [text.token_ids for text in texts] == rows
    assert len({sum(text.kept) for text in texts}) > 3  # some texts keep much, some nothing

    trial = tried(trained, target, texts)
    assert (trial.num_texts, trial.num_greedy) == (NUM_SAMPLED, 0)
    assert trial.trained == scored.acceptance_of(texts, trained.sizes.block_size)
    assert trial.engine == trial.trained  # float32: nothing but bfloat16 features rounds
    assert trial.greedy != trial.engine


def test_texts_that_the_engine_writes_itself_are_not_gone_along(trained, target, monkeypatch):
    monkeypatch.setattr("pipeline.export.trial.ReplayEngine", None)
    trial = tried(trained, target, trained.texts[:NUM_SAMPLED])
    assert trial.num_greedy == trial.num_texts == NUM_SAMPLED
    assert trial.engine == trial.greedy
    assert trial.engine.accept_length == pytest.approx(trial.trained.accept_length, rel=0.005)


def test_texts_without_a_round_are_no_trial(trained, target):
    text = trained.texts[0]
    short = dataclasses.replace(text, token_ids=text.token_ids[: text.prompt_tokens + 1], kept=())
    with pytest.raises(PipelineError, match="no held-out answer has two tokens"):
        tried(trained, target, [short])


def trial_of(trained, engine):
    return Trial(
        trained=Acceptance(trained), engine=Acceptance(engine), greedy=Acceptance(engine), num_texts=3, num_greedy=2
    )


@pytest.mark.parametrize(
    ("engine", "is_refused"), [((99, 101), False), ((104, 96), False), ((107, 93), True), ((90, 110), True)]
)
def test_a_difference_beyond_the_tolerance_is_refused_in_either_direction(engine, is_refused):
    trial = trial_of((100, 100), engine)
    if is_refused:
        with pytest.raises(PipelineError, match=r"1\.500 in the training evaluation and 1\.\d+ in the engine, [+-]\d"):
            require_agreement(trial, 0.02)
    else:
        require_agreement(trial, 0.02)


def test_no_rounds_are_no_agreement():
    with pytest.raises(PipelineError, match="not published"):
        require_agreement(trial_of((0, 0), (1, 0)), 0.02)


def test_a_trial_is_read_back_as_it_was_written():
    trial = trial_of((3, 2), (4, 1))
    assert Trial.from_json(trial.to_json()) == trial
    assert trial.to_json()["accept_length"] == 1.2
