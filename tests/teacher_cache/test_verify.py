"""What the target reads again: everything that is not as stored is named with its shard and row."""

import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from pipeline.artifacts.artifact import Artifact
from pipeline.engine.capture import capture
from pipeline.errors import PipelineError
from pipeline.model.gpt_oss.weights import WeightFormat
from pipeline.model.hf.directory import read_target
from pipeline.prompts.channels import channel_tokens, channels
from pipeline.prompts.tokenizer import load_tokenizer
from pipeline.store.layout import CachedSequence
from pipeline.store.reader import open_split
from pipeline.teacher_cache.verify import CacheVerification, sample_indices, verify_cache

CHANGED = 4  # the sequence of the sample that is changed


@pytest.fixture(scope="module")
def run_verify(cache: Artifact, target_directory: Path) -> Callable[..., CacheVerification]:
    target = read_target(target_directory, WeightFormat())
    tapped = tuple(cache.contract["features"]["tapped_layers"])
    spoken = functools.partial(channels, channel_tokens(load_tokenizer(target_directory)))

    def run(change: Callable[[CachedSequence], CachedSequence] | None = None, **options: object) -> CacheVerification:
        split = open_split(cache.path, "train")
        read = split.read
        prompts = [each.token_ids[: each.prompt_tokens].tolist() for each in read(range(split.num_sequences))]
        if change is not None:
            split.read = lambda indices: [
                change(sequence) if index == CHANGED else sequence
                for index, sequence in zip(indices, read(indices), strict=True)
            ]
        settings = {"tie_gap": 1e-3, "is_exact": True} | options
        recapture = lambda texts, _prompt_ids: capture(target, tapped, texts)  # noqa: E731
        return verify_cache(split, [1, CHANGED, 6], prompts, recapture, spoken, **settings)

    return run


def test_what_stands_as_it_was_written_is_counted(run_verify: Callable[..., CacheVerification]) -> None:
    found = run_verify()
    assert found.num_sequences == 3
    assert found.num_tokens > 100
    assert found.worst_difference < 0.01


def _token_changed(sequence: CachedSequence) -> CachedSequence:
    token_ids = sequence.token_ids.copy()
    token_ids[-3] = (token_ids[-3] + 1) % 200
    return dataclasses.replace(sequence, token_ids=token_ids)


def _feature_changed(sequence: CachedSequence) -> CachedSequence:
    features = sequence.features.copy()
    features[7, :3] += ml_dtypes.bfloat16(9.0)
    return dataclasses.replace(sequence, features=features)


def _channel_changed(sequence: CachedSequence) -> CachedSequence:
    return dataclasses.replace(sequence, channels=np.roll(sequence.channels, 1))


def _labels_moved(sequence: CachedSequence) -> CachedSequence:
    return dataclasses.replace(sequence, prompt_tokens=sequence.prompt_tokens + 1)


def _features_moved(sequence: CachedSequence) -> CachedSequence:
    return dataclasses.replace(sequence, features=np.roll(sequence.features, 1, axis=0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_token_changed, r"\d+ tokens are not those that the target chooses"),
        (_feature_changed, r"the features of 1 of \d+ tokens are not the target's \(the worst is off by"),
        (_features_moved, r"the features of \d+ of \d+ tokens are not the target's"),
        (_channel_changed, r"has other channels than its control tokens say"),
        (_labels_moved, r"does not begin with its prompt"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_was_changed_is_named_by_shard_and_row(
    run_verify: Callable[..., CacheVerification], cache: Artifact, change: Callable, message: str
) -> None:
    with pytest.raises(PipelineError) as raised:
        run_verify(change)
    assert re.search(rf"{cache.path}/train/00000, row {CHANGED}:? {message}", str(raised.value))
    assert "row 1" not in str(raised.value)
    assert "row 6" not in str(raised.value)


def test_a_token_that_nobody_can_judge_is_seen_by_its_features(run_verify: Callable[..., CacheVerification]) -> None:
    """Of an endpoint's text every token may have been chosen; its features are those of another one all the same."""
    with pytest.raises(PipelineError, match=rf"row {CHANGED}: the features of \d+ of"):
        run_verify(_token_changed, tie_gap=None)


def test_one_token_of_a_bfloat16_target_may_differ(run_verify: Callable[..., CacheVerification]) -> None:
    assert run_verify(_feature_changed, is_exact=False).worst_difference > 0.05


@pytest.mark.parametrize(("count", "share", "wanted"), [(22, 0.01, 1), (22, 0.5, 11), (1000, 0.01, 10), (7, 1.0, 7)])
def test_a_share_is_drawn_once_and_for_all(count: int, share: float, wanted: int) -> None:
    found = sample_indices(count, share, seed=3)
    assert len(found) == len(set(found)) == wanted
    assert found == sorted(found) == sample_indices(count, share, seed=3)
    assert all(0 <= index < count for index in found)
    if wanted < count and count > 100:
        assert found != sample_indices(count, share, seed=4)
