"""Rotary positions as GPT-OSS has them: YaRN whose ramp may begin and end between two frequencies."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from sgl_jax.srt.layers.embeddings import RotaryEmbedding, YarnRotaryEmbedding
from transformers import PretrainedConfig


class ExactYarn(YarnRotaryEmbedding):
    """YaRN with `truncate`: the engine's own always rounds the ends of the ramp, which GPT-OSS does not.

    Source: transformers `_compute_yarn_parameters`.
    """

    def __init__(self, *args: Any, truncate: bool, **kwargs: Any) -> None:
        self._truncate = truncate
        super().__init__(*args, **kwargs)

    def _compute_yarn_inv_freq(self) -> np.ndarray:
        pairs = np.arange(0, self.rotary_dim, 2, dtype=np.float64) / self.rotary_dim
        own = 1.0 / self.base**pairs
        low, high = (self._pair_of(turns) for turns in (self.beta_fast, self.beta_slow))
        if self._truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.rotary_dim - 1)
        ramp = np.clip((np.arange(len(pairs)) - low) / max(high - low, 0.001), 0, 1)
        return (own / self.scaling_factor * ramp + own * (1 - ramp)).astype(np.float32)

    def _pair_of(self, turns: float) -> float:
        """Returns the frequency, as a number of pairs, that turns so often within the original context."""
        length = self.original_max_position_embeddings
        return self.rotary_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(self.base))


def rope_of(config: PretrainedConfig, head_dim: int, dtype: jnp.dtype) -> RotaryEmbedding:
    """Returns the rotary embedding that a configuration describes.

    The newer `rope_parameters` stand before `rope_scaling` and `rope_theta`: transformers 4 keeps the first as it is
    in the file and fills the others with GPT-OSS's own where the file lacks them. Raises ValueError for another kind.
    """
    parameters = dict(getattr(config, "rope_scaling", None) or {})
    newer = getattr(config, "rope_parameters", None)
    theta = getattr(config, "rope_theta", None)
    if newer:
        parameters, theta = dict(newer), newer.get("rope_theta", theta)
    theta = 10000.0 if theta is None else float(theta)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    positions = int(config.max_position_embeddings)
    if kind == "default":
        return RotaryEmbedding(head_dim, head_dim, positions, theta, True, dtype)
    if kind != "yarn":
        raise ValueError(f"the configuration's rope_type is {kind!r}; this package knows 'yarn' and 'default'")
    return ExactYarn(
        head_dim,
        head_dim,
        positions,
        theta,
        True,
        dtype,
        scaling_factor=float(parameters["factor"]),
        original_max_position_embeddings=int(parameters.get("original_max_position_embeddings", positions)),
        beta_fast=float(parameters.get("beta_fast") or 32.0),
        beta_slow=float(parameters.get("beta_slow") or 1.0),
        truncate=bool(parameters.get("truncate", True)),
    )
