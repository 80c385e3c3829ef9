"""The exported draft in the engine beside the training evaluation, on texts that greedy decoding writes or does not."""

import dataclasses

import numpy as np
import pytest

from pipeline.dflash.acceptance import Acceptance
from pipeline.engine.capture import capture
from pipeline.engine.config import EngineConfig
from pipeline.errors import PipelineError
from pipeline.export.engine_check import EngineCheck, require_agreement, run_engine_check
from pipeline.model.gpt_oss.weights import WeightFormat
from pipeline.model.hf.directory import read_target
from pipeline.prompts.chat_format import stop_token_ids
from pipeline.prompts.tokenizer import load_tokenizer
from pipeline.store import heldout_rounds
from pipeline.store.layout import CachedSequence
from pipeline.store.reader import open_split
from pipeline.store.writer import write_header
from pipeline.train.evaluation.evaluate import evaluate
from pipeline.train.loss.vocab_shard import FrozenTables
from tests.support import loop as tiny_loop
from tests.support import training as tiny_training
from tests.support.faulty_training import Trained

pytestmark = pytest.mark.usefixtures("compiled_quickly")

NUM_SAMPLED = 12


@pytest.fixture(scope="module")
def trained():
    return Trained.read()


@pytest.fixture(scope="module")
def target(trained):
    return read_target(trained.target.path, WeightFormat())


def checked(trained, target, texts):
    config = EngineConfig(
        num_slots=5,
        max_length=200,
        prefill_chunk=tiny_loop.configuration(trained.target.path).engine.prefill_chunk,
        stop_token_ids=tuple(stop_token_ids(load_tokenizer(trained.target.path))),
    )
    return run_engine_check(target, trained.draft, texts, config)


def require_rounds_of(check):
    """The engine counted training's rounds. All is float32, but training reads its features in bfloat16: on some
    processors a proposal that is nearly a tie then goes the other way, and of two hundred rounds one comes or goes."""
    assert abs(check.engine.num_rounds - check.trained.num_rounds) <= 2
    assert abs(check.engine.num_accepted - check.trained.num_accepted) <= 2


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
    draft = trained.draft
    greedy = trained.texts[:NUM_SAMPLED]
    rows = [
        text.prompt_ids + answer for text, answer in zip(greedy, sampled(greedy, target.config.vocab_size), strict=True)
    ]
    captured = dict(capture(target, draft.config.tapped_layers, rows))
    sequences = [
        CachedSequence(
            token_ids=np.array(row, np.int32),
            channels=np.zeros(len(row), np.uint8),
            prompt_tokens=text.prompt_tokens,
            features=captured[index].features,
        )
        for index, (row, text) in enumerate(zip(rows, greedy, strict=True))
    ]
    shards = tiny_training.write_split(tmp_path, "heldout", sequences)
    layout = tiny_training.layout_of(draft.config.feature_size)
    write_header(tmp_path, layout, {"train": 0, "heldout": shards})
    split = open_split(tmp_path, "heldout")
    tables = FrozenTables(target.weights.embedding, target.weights.head, target.config.vocab_size)
    texts = evaluate(draft, tables, split).texts
    assert [text.token_ids for text in texts] == rows
    assert len({sum(text.accepted_per_round) for text in texts}) > 3  # much is accepted of some texts, of some nothing

    check = checked(trained, target, texts)
    assert (check.num_texts, check.num_greedy) == (NUM_SAMPLED, 0)
    assert check.trained == heldout_rounds.acceptance_of(texts, draft.config.block_size)
    require_rounds_of(check)
    assert check.greedy != check.engine


def test_texts_that_the_engine_writes_itself_are_not_gone_along(trained, target, monkeypatch):
    monkeypatch.setattr("pipeline.export.engine_check.ForcedDecodingEngine", None)
    check = checked(trained, target, trained.texts[:NUM_SAMPLED])
    assert check.num_greedy == check.num_texts == NUM_SAMPLED
    assert check.engine == check.greedy
    require_rounds_of(check)


def test_texts_without_a_round_are_no_check(trained, target):
    text = trained.texts[0]
    short = dataclasses.replace(text, token_ids=text.token_ids[: text.prompt_tokens + 1], accepted_per_round=())
    with pytest.raises(PipelineError, match="no held-out answer has two tokens"):
        checked(trained, target, [short])


def check_of(trained, engine):
    return EngineCheck(
        trained=Acceptance(trained), engine=Acceptance(engine), greedy=Acceptance(engine), num_texts=3, num_greedy=2
    )


@pytest.mark.parametrize(
    ("engine", "is_refused"), [((99, 101), False), ((104, 96), False), ((107, 93), True), ((90, 110), True)]
)
def test_a_difference_beyond_the_tolerance_is_refused_in_either_direction(engine, is_refused):
    check = check_of((100, 100), engine)
    if is_refused:
        with pytest.raises(PipelineError, match=r"1\.500 in the training evaluation and 1\.\d+ in the engine, [+-]\d"):
            require_agreement(check, 0.02)
    else:
        require_agreement(check, 0.02)


def test_no_rounds_are_no_agreement():
    with pytest.raises(PipelineError, match="not published"):
        require_agreement(check_of((0, 0), (1, 0)), 0.02)


def test_a_check_is_read_back_as_it_was_written():
    check = check_of((3, 2), (4, 1))
    assert EngineCheck.from_json(check.to_json()) == check
    assert check.to_json()["accept_length"] == 1.2
