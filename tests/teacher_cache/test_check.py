"""The acceptance check passes a true cache and catches every cache that is one place off."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from pipeline.artifacts import Artifact, PipelineError
from pipeline.dflash import blocks
from pipeline.model import checkpoints
from pipeline.model.gpt_oss_weights import WeightsForm
from pipeline.teacher_cache.capture import Captured, capture
from pipeline.teacher_cache.check import Checked, check
from pipeline.teacher_cache.store import CachedSequence, CacheSplit, open_split

BLOCK_SIZE = 4
Change = Callable[[CachedSequence], CachedSequence]


@pytest.fixture
def run_check(cache: Artifact, target_directory: Path) -> Callable[..., Checked]:
    config, weights = checkpoints.load_target(target_directory, WeightsForm())
    tapped = tuple(cache.contract["features"]["tapped_layers"])

    def retake(texts: list[list[int]], _: list[str]) -> Iterator[tuple[int, Captured]]:
        return capture(weights, config, tapped, texts)

    def run(change: Change | None = None, block_size: int = BLOCK_SIZE) -> Checked:
        split = open_split(cache.path, "heldout")
        sequences = split.read(range(split.num_sequences))
        prompts = [sequence.token_ids[: sequence.prompt_tokens].tolist() for sequence in sequences]
        if change is not None:
            _replace_reads(split, change)
        return check(
            split,
            prompts,
            retake,
            block_size=block_size,
            vocab_size=config.vocab_size,
            tie_gap=1e-3,
            is_exact=True,
            seed=0,
        )

    return run


def _replace_reads(split: CacheSplit, change: Change) -> None:
    read = split.read
    split.read = lambda indices: [change(sequence) for sequence in read(indices)]


def _changed(sequence: CachedSequence, **values: object) -> CachedSequence:
    return dataclasses.replace(sequence, **values)


@pytest.mark.parametrize("block_size", [2, 4, 7])
def test_gold_scores_exactly_b_and_random_about_one(run_check: Callable[..., Checked], block_size: int) -> None:
    checked = run_check(block_size=block_size)
    assert checked.gold.accept_length == block_size
    assert checked.gold.accept_rate == 1.0
    assert checked.gold.num_rounds >= 5
    assert 1.0 <= checked.random.accept_length < 1.1


def test_the_text_is_diverse_enough_to_show_a_shift(cache: Artifact) -> None:
    split = open_split(cache.path, "heldout")
    for sequence in split.read(range(split.num_sequences)):
        answer = sequence.token_ids[sequence.prompt_tokens :]
        assert np.mean(answer[1:] != answer[:-1]) > 0.5


@pytest.mark.parametrize("shift", [1, -1])
def test_labels_one_place_off_are_caught(
    run_check: Callable[..., Checked], monkeypatch: pytest.MonkeyPatch, shift: int
) -> None:
    true_labels = blocks.block_labels

    def shifted(token_ids: object, generated: object, anchors: object, block_size: int) -> object:
        labels, _ = true_labels(token_ids, generated, jnp.maximum(anchors + shift, 0), block_size)
        _, counts = true_labels(token_ids, generated, anchors, block_size)
        return labels, counts

    monkeypatch.setattr(blocks, "block_labels", shifted)
    with pytest.raises(PipelineError, match=r"labels of training has accept_length [12]"):
        run_check()


@pytest.mark.parametrize("shift", [1, -1])
def test_features_one_place_off_are_caught(run_check: Callable[..., Checked], shift: int) -> None:
    with pytest.raises(PipelineError, match=r"features of .* tokens are not the target's"):
        run_check(lambda sequence: _changed(sequence, features=np.roll(sequence.features, shift, axis=0)))


def test_swapped_taps_are_caught(run_check: Callable[..., Checked]) -> None:
    with pytest.raises(PipelineError, match=r"features of .* tokens are not the target's"):
        run_check(lambda sequence: _changed(sequence, features=np.roll(sequence.features, 40, axis=1)))


def test_an_answer_that_the_target_did_not_write_is_caught(run_check: Callable[..., Checked]) -> None:
    def shifted(sequence: CachedSequence) -> CachedSequence:
        token_ids = sequence.token_ids.copy()
        token_ids[sequence.prompt_tokens :] = np.roll(token_ids[sequence.prompt_tokens :], 1)
        return _changed(sequence, token_ids=token_ids)

    with pytest.raises(PipelineError, match="labels of training has accept_length"):
        run_check(shifted)


@pytest.mark.parametrize("shift", [1, -1])
def test_a_prompt_length_one_off_is_caught(run_check: Callable[..., Checked], shift: int) -> None:
    with pytest.raises(PipelineError, match="do not begin with their prompt"):
        run_check(lambda sequence: _changed(sequence, prompt_tokens=sequence.prompt_tokens + shift))


def test_answers_shorter_than_a_block_are_told(run_check: Callable[..., Checked]) -> None:
    with pytest.raises(PipelineError, match="no held-out answer holds a whole block of 40 tokens"):
        run_check(block_size=40)
