"""Rotary position embedding, plain and YaRN, in the rotate-half layout."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pipeline.errors import PipelineError
from pipeline.model.layers.config_values import is_number


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Holds how positions become angles. `factor` None is plain RoPE; otherwise YaRN (Peng et al., arXiv 2309.00071).

    `truncate` rounds YaRN's correction range to whole dimensions; GPT-OSS does not.
    """

    theta: float
    factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    original_max_position_embeddings: int = 4096
    truncate: bool = True
    attention_factor: float | None = None

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Rope":
        """Reads either spelling of an HF config: `rope_parameters`, or `rope_theta` with `rope_scaling`.

        Raises PipelineError when the two disagree, lack what decides the angles, or name a kind of RoPE that is not
        implemented.
        """
        new, old = config.get("rope_parameters"), config.get("rope_scaling")
        spellings = [values for values in (new, old) if values is not None] or [{}]
        for values in spellings:
            if not isinstance(values, dict):
                raise PipelineError(f"config.json has {values!r} as rope_parameters or rope_scaling; wanted an object")
        for values in (config, *spellings):
            _require_numbers(values)
        thetas = {values.get("rope_theta") for values in (config, *spellings)} - {None}
        if not thetas:
            raise PipelineError("config.json has no rope_theta (neither at top level nor in rope_parameters)")
        if len(thetas) > 1:
            raise PipelineError(
                f"config.json says rope_theta {config.get('rope_theta')} at top level and {sorted(thetas)} in all; "
                "they must agree"
            )
        theta = float(thetas.pop())
        ropes = [cls._of_kind(theta, values) for values in spellings]
        if any(other != ropes[0] for other in ropes):
            raise PipelineError(f"config.json says rope_parameters {new} and rope_scaling {old}; they must agree")
        return ropes[0]

    @classmethod
    def _of_kind(cls, theta: float, values: dict[str, Any]) -> "Rope":
        present = {key: value for key, value in values.items() if key != "rope_theta" and value is not None}
        kinds = [present.pop(key) for key in ("rope_type", "type") if key in present]  # the latter is the older name
        kind = kinds[0] if kinds else "default"
        if kind == "default":
            return cls(theta=theta)
        unknown = sorted(present.keys() - {field.name for field in dataclasses.fields(cls)} - {"theta"})
        if kind != "yarn" or unknown:
            raise PipelineError(f"RoPE of kind {kind!r} with {unknown or 'no other keys'}; known are default and yarn")
        lacking = [key for key in ("factor", "original_max_position_embeddings") if key not in present]
        if lacking:
            raise PipelineError(
                f"RoPE of kind 'yarn' lacks {' and '.join(lacking)}, for which runtimes have different defaults"
            )
        return cls(theta=theta, **present)

    def to_hf(self) -> dict[str, Any]:
        """Returns the `rope_parameters` dictionary of transformers 5."""
        if self.factor is None:
            return {"rope_type": "default", "rope_theta": self.theta}
        values = dataclasses.asdict(self)
        values["rope_theta"] = values.pop("theta")
        return {"rope_type": "yarn", **{key: value for key, value in values.items() if value is not None}}

    def to_hf_spellings(self) -> dict[str, Any]:
        """Returns the keys of a `config.json` in both spellings that `from_hf` reads.

        transformers 5 reads `rope_parameters`. transformers 4 reads the others, and where a GPT-OSS model lacks them
        it takes that of the published one without a word.
        """
        rope = self.to_hf()
        legacy = {key: value for key, value in rope.items() if key != "rope_theta"}
        return {
            "rope_theta": self.theta,
            "rope_scaling": None if self.factor is None else legacy,
            "rope_parameters": rope,
        }


def _require_numbers(values: dict[str, Any]) -> None:
    """Raises PipelineError when a value of RoPE that is a number elsewhere is none here."""
    for key in (
        "rope_theta",
        "factor",
        "beta_fast",
        "beta_slow",
        "original_max_position_embeddings",
        "attention_factor",
    ):
        value = values.get(key)
        if value is not None and not (is_number(value) and value > 0):
            raise PipelineError(f"{key}: found {value!r}, wanted a positive number")
    if not isinstance(values.get("truncate") or False, bool):
        raise PipelineError(f"truncate: found {values['truncate']!r}, wanted true or false")


def frequencies(rope: Rope, head_dim: int) -> tuple[Float[np.ndarray, " half"], float]:
    """Returns the angle per position of each of H/2 pairs of dimensions, and the factor on cos and sin.

    They are float32 like transformers' `_compute_yarn_parameters`, so that long positions round alike.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain = np.float32(1) / np.float32(rope.theta) ** exponent
    if rope.factor is None:
        return plain, 1.0

    def dimension_of(rotations: float) -> float:
        ratio = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a ramp of no width would divide by zero
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    stretched = plain / np.float32(rope.factor)
    scale = rope.attention_factor
    if scale is None:
        scale = 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0
    return (stretched * ramp + plain * (1 - ramp)).astype(np.float32), scale


def angles(
    rope: Rope, head_dim: int, positions: Int[Array, "*batch"]
) -> tuple[Float[Array, "*batch half"], Float[Array, "*batch half"]]:
    """Returns cos and sin of every position, float32 [*batch, H/2], YaRN's attention factor included."""
    inverse, scale = frequencies(rope, head_dim)
    radians = positions[..., None].astype(jnp.float32) * inverse
    return jnp.cos(radians) * scale, jnp.sin(radians) * scale


def rotate(
    heads: Float[Array, "*batch N H"], cos: Float[Array, "*batch half"], sin: Float[Array, "*batch half"]
) -> Float[Array, "*batch N H"]:
    """Rotates heads [*batch, N, H] by their position's angles, the first half of a head against the second."""
    first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)  # bf16 angles lose whole radians
    cos, sin = cos[..., None, :], sin[..., None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(heads.dtype)
