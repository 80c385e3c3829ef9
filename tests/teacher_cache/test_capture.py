"""The teacher-forced pass against a plain forward over each text alone."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pipeline.artifacts import Artifact
from pipeline.model import checkpoints, gpt_oss
from pipeline.model.gpt_oss_config import GptOssConfig
from pipeline.model.gpt_oss_weights import GptOssWeights, WeightsForm
from pipeline.teacher_cache.capture import Captured, capture, disagreements, padded_length
from pipeline.teacher_cache.store import open_split

TAPPED = (0, 2)


@partial(jax.jit, static_argnames=("config", "tapped_layers"))
def _plain_forward(
    weights: GptOssWeights, token_ids: jax.Array, *, config: GptOssConfig, tapped_layers: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    out = gpt_oss.forward(weights, config, token_ids[None], jnp.zeros(1, jnp.int32), None, tapped_layers)
    return out.features[0], gpt_oss.logits(weights, out.hidden[0])


def _assert_equal_but_for_rounding(features: np.ndarray, wanted: np.ndarray) -> None:
    """bfloat16 of the same numbers; one summed in another order may round the other way.

    Float32 sums round by the size of what is summed: by the row's norm, also where an element is near zero.
    """
    assert features.dtype == ml_dtypes.bfloat16
    assert features.shape == wanted.shape
    rounded = wanted.astype(ml_dtypes.bfloat16).astype(np.float32)
    found = features.astype(np.float32)
    summed = 1e-6 * np.linalg.norm(wanted, axis=1, keepdims=True)
    assert np.all(np.abs(found - rounded) <= np.abs(wanted) * 2**-7 + summed)
    assert np.mean(found == rounded) > 0.99


def test_features_and_choices_are_those_of_the_plain_forward(target_directory: Path) -> None:
    config, weights = checkpoints.load_target(target_directory, WeightsForm())
    random = np.random.default_rng(0)
    texts = [random.integers(0, config.vocab_size, count).tolist() for count in (70, 3, 64)]
    found = dict(capture(weights, config, TAPPED, texts))
    assert sorted(found) == [0, 1, 2]
    for index, text in enumerate(texts):
        features, logits = _plain_forward(weights, jnp.array(text), config=config, tapped_layers=TAPPED)
        _assert_equal_but_for_rounding(found[index].features, np.asarray(features))
        logits = np.asarray(logits)
        assert np.array_equal(found[index].next_ids, logits.argmax(axis=-1))
        below = logits.max(axis=-1)[:-1] - logits[np.arange(len(text) - 1), text[1:]]
        np.testing.assert_allclose(found[index].shortfall[:-1], below, atol=1e-4)


def test_a_cached_answer_is_greedy_and_its_features_are_the_plain_forwards(
    cache: Artifact, target_directory: Path
) -> None:
    config, weights = checkpoints.load_target(target_directory, WeightsForm())
    tapped = tuple(cache.contract["features"]["tapped_layers"])
    for sequence in open_split(cache.path, "train").read([1, 9]):
        token_ids, first = sequence.token_ids, sequence.prompt_tokens
        features, logits = _plain_forward(weights, jnp.array(token_ids), config=config, tapped_layers=tapped)
        _assert_equal_but_for_rounding(sequence.features, np.asarray(features))
        assert np.array_equal(np.asarray(logits).argmax(axis=-1)[first - 1 : -1], token_ids[first:])


def test_only_generated_tokens_can_disagree() -> None:
    captured = Captured(
        features=np.zeros((5, 2), ml_dtypes.bfloat16),
        next_ids=np.array([9, 9, 7, 9, 9], np.int32),
        shortfall=np.array([1.0, 0.0, 0.25, 0.0, 3.0], np.float32),
    )
    found = disagreements(captured, [1, 2, 3, 4, 5], prompt_tokens=2)
    assert [(one.position, one.found_id, one.wanted_id, one.gap) for one in found] == [(3, 4, 7, 0.25)]


@pytest.mark.parametrize(("count", "length"), [(1, 64), (64, 64), (65, 128), (512, 512), (513, 1024), (1025, 1536)])
def test_texts_are_padded_to_few_lengths(count: int, length: int) -> None:
    assert padded_length(count) == length
