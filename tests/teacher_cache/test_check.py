"""The acceptance check passes a true cache and catches every cache that is one position off."""

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from pipeline.artifacts.artifact import Artifact
from pipeline.dflash import blocks
from pipeline.engine.capture import Captured, capture
from pipeline.errors import PipelineError
from pipeline.model.dflash.config import DFlashConfig
from pipeline.model.gpt_oss.weights import WeightFormat
from pipeline.model.hf.directory import read_target
from pipeline.model.layers.rope import Rope
from pipeline.store.layout import CachedSequence
from pipeline.store.reader import CacheSplit, open_split
from pipeline.teacher_cache.check import CacheCheck, check_cache

BLOCK_SIZE = 4
Change = Callable[[CachedSequence], CachedSequence]


@pytest.fixture
def run_check(cache: Artifact, target_directory: Path) -> Callable[..., CacheCheck]:
    target = read_target(target_directory, WeightFormat())
    tapped = tuple(cache.contract["features"]["tapped_layers"])

    def recapture(texts: list[list[int]], _: list[str]) -> Iterator[tuple[int, Captured]]:
        return capture(target, tapped, texts)

    def run(change: Change | None = None, block_size: int = BLOCK_SIZE) -> CacheCheck:
        split = open_split(cache.path, "heldout")
        sequences = split.read(range(split.num_sequences))
        prompts = [sequence.token_ids[: sequence.prompt_tokens].tolist() for sequence in sequences]
        if change is not None:
            _replace_reads(split, change)
        return check_cache(
            split,
            prompts,
            recapture,
            draft=_draft(block_size, target.config.vocab_size),
            tie_gap=1e-3,
            is_exact=True,
            seed=0,
        )

    return run


def _draft(block_size: int, vocab_size: int) -> DFlashConfig:
    return DFlashConfig(
        vocab_size=vocab_size,
        hidden_size=40,
        intermediate_size=28,
        num_hidden_layers=1,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=10,
        rope=Rope(theta=1e6),
        tapped_layers=(0, 2),
        num_target_layers=4,
        block_size=block_size,
        mask_token_id=0,
    )


def _replace_reads(split: CacheSplit, change: Change) -> None:
    read = split.read
    split.read = lambda indices: [change(sequence) for sequence in read(indices)]


def _changed(sequence: CachedSequence, **values: object) -> CachedSequence:
    return dataclasses.replace(sequence, **values)


@pytest.mark.parametrize("block_size", [2, 4, 7])
def test_gold_scores_exactly_b_and_random_about_one(run_check: Callable[..., CacheCheck], block_size: int) -> None:
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
def test_labels_one_position_off_are_caught(
    run_check: Callable[..., CacheCheck], monkeypatch: pytest.MonkeyPatch, shift: int
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
def test_features_one_position_off_are_caught(run_check: Callable[..., CacheCheck], shift: int) -> None:
    with pytest.raises(PipelineError, match=r"features of .* tokens are not the target's"):
        run_check(lambda sequence: _changed(sequence, features=np.roll(sequence.features, shift, axis=0)))


def test_swapped_taps_are_caught(run_check: Callable[..., CacheCheck]) -> None:
    with pytest.raises(PipelineError, match=r"features of .* tokens are not the target's"):
        run_check(lambda sequence: _changed(sequence, features=np.roll(sequence.features, 40, axis=1)))


def test_an_answer_that_the_target_did_not_write_is_caught(run_check: Callable[..., CacheCheck]) -> None:
    def shifted(sequence: CachedSequence) -> CachedSequence:
        token_ids = sequence.token_ids.copy()
        token_ids[sequence.prompt_tokens :] = np.roll(token_ids[sequence.prompt_tokens :], 1)
        return _changed(sequence, token_ids=token_ids)

    with pytest.raises(PipelineError, match="labels of training has accept_length"):
        run_check(shifted)


@pytest.mark.parametrize("shift", [1, -1])
def test_a_prompt_length_one_off_is_caught(run_check: Callable[..., CacheCheck], shift: int) -> None:
    with pytest.raises(PipelineError, match="do not begin with their prompt"):
        run_check(lambda sequence: _changed(sequence, prompt_tokens=sequence.prompt_tokens + shift))


def test_answers_shorter_than_a_block_are_reported(run_check: Callable[..., CacheCheck]) -> None:
    with pytest.raises(PipelineError) as raised:
        run_check(block_size=40)
    wanted = r"none of the \d+ held-out answers holds a whole block of 40 tokens .* ends after 24; .* draft\.block_size"
    assert re.fullmatch(wanted, str(raised.value))  # one piece of advice: another cache of these prompts is no better
