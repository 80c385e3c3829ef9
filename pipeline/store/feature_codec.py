"""Encodes and decodes stored features: bfloat16, as the draft is served with them, int8 with scales, or none.

The outputs of a target's layers differ a hundredfold in size (docs/dflash.md#tapped-layers). With one scale for a
token, what a small layer says would round to nothing; so every token has one scale for each tapped layer: 20 bytes
beside 14,400 for gpt-oss.
"""

import ml_dtypes
import numpy as np
from jaxtyping import Bool, Float32, Int8

BFLOAT16_EXPONENT = 0x7F80  # all ones: infinite or nan
LARGEST = 127  # of int8, by either sign


def token_bytes(stored: str, feature_size: int, num_tapped: int) -> int:
    """Returns the bytes that the features of one token take."""
    return {"bfloat16": 2 * feature_size, "int8": feature_size + 4 * num_tapped, "none": 0}[stored]


def encode(features: np.ndarray | None, stored: str, num_tapped: int) -> dict[str, np.ndarray]:
    """Returns the arrays that store bfloat16 features [T, L * D]: `features`, and for int8 the `scales` [T, L] too.

    Values that are not finite give scales that are not.
    """
    if stored == "none":
        return {}
    assert features is not None, "a cache that stores features has them"
    if stored == "bfloat16":
        return {"features": features}
    quantized, scales = quantize(features, num_tapped)
    return {"features": quantized, "scales": scales}


def decode(arrays: dict[str, np.ndarray]) -> np.ndarray | None:
    """Returns the bfloat16 features [T, L * D] of what `encode` returned; None of no arrays."""
    if "scales" not in arrays:
        return arrays.get("features")
    features, scales = arrays["features"], arrays["scales"]
    layers = features.reshape(*scales.shape, -1).astype(np.float32)  # int8 holds no products
    return (layers * scales[..., None]).reshape(features.shape).astype(ml_dtypes.bfloat16)


def quantize(features: np.ndarray, num_tapped: int) -> tuple[Int8[np.ndarray, "T LD"], Float32[np.ndarray, "T L"]]:
    """Rounds features to the nearest of 255 steps between a token's and layer's largest value and its negative."""
    quantized = np.empty(features.shape, np.int8)
    scales = np.empty((len(features), num_tapped), np.float32)
    for start in range(0, len(features), 4096):  # in float32 all at once would be three times what is stored
        layers = (
            features[start : start + 4096].astype(np.float32).reshape(-1, num_tapped, features.shape[1] // num_tapped)
        )
        scale = np.abs(layers).max(axis=2) / LARGEST
        divides = (np.isfinite(scale) & (scale > 0))[..., None]
        steps = np.rint(np.divide(layers, scale[..., None], out=np.zeros_like(layers), where=divides))
        quantized[start : start + 4096] = steps.reshape(len(layers), -1).astype(np.int8)
        scales[start : start + 4096] = scale
    return quantized, scales


def relative_errors(found: np.ndarray, wanted: np.ndarray, num_tapped: int) -> Float32[np.ndarray, "T L"]:
    """Returns how far features [T, L * D] lie from others, by token and layer: |found - wanted| / |wanted|."""
    shape = (len(wanted), num_tapped, -1)
    found, wanted = (array.astype(np.float32).reshape(shape) for array in (found, wanted))  # bfloat16's squares round
    return np.linalg.norm(found - wanted, axis=2) / np.linalg.norm(wanted, axis=2)


def is_finite(arrays: dict[str, np.ndarray]) -> Bool[np.ndarray, " T"]:
    """Returns which tokens have finite values alone; bfloat16 is judged by its bits, many times as fast as by value."""
    if "scales" in arrays:
        return np.isfinite(arrays["scales"]).all(axis=1)
    if "features" not in arrays:
        return np.ones(0, bool)
    exponents = arrays["features"].view(np.uint16) & BFLOAT16_EXPONENT
    return (exponents != BFLOAT16_EXPONENT).all(axis=1)
