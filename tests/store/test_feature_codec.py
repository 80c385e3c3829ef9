"""Features as they are stored: what int8 loses, and that one scale for a whole token would lose a layer."""

import ml_dtypes
import numpy as np
import pytest

from pipeline.artifacts.artifact import Artifact
from pipeline.store import feature_codec
from pipeline.store.reader import open_split

pytestmark = pytest.mark.usefixtures("compiled_quickly")

GPT_OSS = {"feature_size": 5 * 2880, "num_tapped": 5}
SIZES = (0.27, 23.1, 26.9)  # RMS of layers, as measured for Qwen3-8B (docs/dflash.md#tapped-layers)


def layers_of_different_sizes(num_tokens: int, width: int) -> np.ndarray:
    random = np.random.default_rng(0)
    parts = [size * random.normal(size=(num_tokens, width)) for size in SIZES]
    return np.concatenate(parts, axis=1).astype(ml_dtypes.bfloat16)


def there_and_back(array: np.ndarray, num_tapped: int) -> np.ndarray:
    return feature_codec.decode(feature_codec.encode(array, "int8", num_tapped))


@pytest.mark.parametrize(("stored", "wanted"), [("bfloat16", 28_800), ("int8", 14_420), ("none", 0)])
def test_a_token_of_gpt_oss_with_five_taps_takes(stored: str, wanted: int) -> None:
    assert feature_codec.token_bytes(stored, **GPT_OSS) == wanted


def test_int8_is_within_one_percent_in_every_layer() -> None:
    wanted = layers_of_different_sizes(100, 2880)
    found = there_and_back(wanted, len(SIZES))
    assert found.dtype == ml_dtypes.bfloat16
    errors = feature_codec.relative_errors(found, wanted, len(SIZES))
    assert errors.shape == (100, len(SIZES))
    assert errors.max() < 0.0125
    assert errors.mean() < 0.01


def test_one_scale_for_a_token_would_lose_the_small_layer() -> None:
    """Why there is one for each layer: the same numbers under a common scale."""
    wanted = layers_of_different_sizes(100, 2880)
    common = feature_codec.decode(feature_codec.encode(wanted, "int8", 1))
    errors = feature_codec.relative_errors(common, wanted, len(SIZES))
    assert errors[:, 0].min() > 0.5
    assert errors[:, 2].max() < 0.0125


def test_int8_is_within_one_percent_on_what_a_target_gives(cache: Artifact) -> None:
    split = open_split(cache.path, "train")
    for sequence in split.read(range(split.num_sequences)):
        found = there_and_back(sequence.features, split.layout.num_tapped)
        assert feature_codec.relative_errors(found, sequence.features, split.layout.num_tapped).max() < 0.0125


def test_what_is_decoded_is_what_the_scales_say() -> None:
    """Against arithmetic in float64, value by value."""
    wanted = layers_of_different_sizes(7, 24)
    arrays = feature_codec.encode(wanted, "int8", len(SIZES))
    assert arrays["features"].dtype == np.int8
    scales = np.repeat(arrays["scales"].astype(np.float64), 24, axis=1)
    np.testing.assert_allclose(
        scales, np.repeat(np.abs(wanted.astype(np.float64).reshape(7, 3, 24)).max(2), 24, 1) / 127
    )
    assert np.abs(arrays["features"] - wanted.astype(np.float64) / scales).max() <= 0.5 + 1e-6
    exact = arrays["features"] * scales
    np.testing.assert_allclose(feature_codec.decode(arrays).astype(np.float64), exact, rtol=2**-8)


def test_features_of_nothing_but_zeros_stay_zeros() -> None:
    zeros = np.zeros((2, 12), ml_dtypes.bfloat16)
    assert not there_and_back(zeros, 3).astype(np.float32).any()


@pytest.mark.parametrize("stored", ["bfloat16", "int8"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_seen_behind_the_encoding(stored: str, value: float) -> None:
    array = layers_of_different_sizes(5, 4)
    array[3, 7] = value
    found = feature_codec.is_finite(feature_codec.encode(array, stored, len(SIZES)))
    assert found.tolist() == [True, True, True, False, True]
