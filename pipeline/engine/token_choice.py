"""The target's own choice behind every token of a text, and how far the text's next token is from it."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from pipeline.model.layers import sampling as sampling_layer
from pipeline.model.layers.sampling import Sampling
from pipeline.model.parallel.shards import Shards

NUCLEUS_SLACK = {"float32": 1e-4, "bfloat16": 0.02}  # how much the order of summation changes the mass above a token
LEAST_TOP_P = 1e-9

Choice = tuple[Int[Array, " T"], Float[Array, " T"]]


def choice(
    logits: Float[Array, "T local"],
    following: Int[Array, " T"],
    keys: UInt32[Array, "T two"] | None,
    positions: Int[Array, " T"],
    sampling: Sampling | None,
    precision: str,
    shards: Shards,
) -> Choice:
    """Returns the target's tokens [T] and the shortfalls [T] (`capture.Captured`) of the text's tokens, `following`.

    `logits` are this shard's part of the vocabulary. `positions` are those of the text's tokens, `sampling` tells how
    they were drawn (None: greedily), and `keys` with which noise, where that is known. `precision` names the dtype
    of the target's weights.
    """
    if sampling is None:
        return _greedy(logits, following, shards)
    if keys is None:
        return _unknown_noise(logits, following, sampling, shards)
    return _known_noise(logits, following, keys, positions, sampling, NUCLEUS_SLACK[precision], shards)


def _greedy(logits: Float[Array, "T local"], following: Int[Array, " T"], shards: Shards) -> Choice:
    return shards.argmax(logits), shards.over().max(logits.max(axis=-1)) - shards.over().take(logits, following)


def _known_noise(
    logits: Float[Array, "T local"],
    following: Int[Array, " T"],
    keys: UInt32[Array, "T two"],
    positions: Int[Array, " T"],
    sampling: Sampling,
    slack: float,
    shards: Shards,
) -> Choice:
    """Returns what the text's own noise chooses, and how far the text's token lies below that.

    Rounding decides which tokens are at the edge of the nucleus: a token may be in it in this pass that was not when
    the text was written. So the choice is taken from a nucleus that is smaller by `slack`, and the text's token may lie
    in one that is larger by it. The shortfall of a token outside of that is its distance from the most likely one.
    """
    scaled = logits / sampling.temperature
    noisy = scaled + sampling_layer.noise(keys, positions, logits.shape[-1], shards)
    of_text, noisy_of_text = shards.over().take(scaled, following), shards.over().take(noisy, following)
    top_p = sampling.top_p if sampling.top_p >= 1 else max(sampling.top_p - slack, LEAST_TOP_P)
    among = jnp.where(sampling_layer.nucleus(scaled, top_p, shards), noisy, -jnp.inf)
    shortfall = jnp.maximum(shards.over().max(among.max(axis=-1)) - noisy_of_text, 0)
    if sampling.top_p < 1:
        best = shards.over().max(scaled.max(axis=-1))
        mass = jnp.exp(scaled - best[:, None])
        above = shards.sum(jnp.where(scaled > of_text[:, None], mass, 0).sum(axis=-1)) / shards.sum(mass.sum(axis=-1))
        shortfall = jnp.where(above < sampling.top_p + slack, shortfall, best - of_text)
    return shards.argmax(among), sampling.temperature * shortfall


def _unknown_noise(
    logits: Float[Array, "T local"], following: Int[Array, " T"], sampling: Sampling, shards: Shards
) -> Choice:
    """Returns the most likely token, and -log p of the text's less the mean -log p of what the target would draw."""
    scaled = logits / sampling.temperature
    scaled = scaled - shards.over().max(scaled.max(axis=-1))[:, None]
    mass = jnp.where(sampling_layer.nucleus(scaled, sampling.top_p, shards), jnp.exp(scaled), 0)
    mean = shards.sum((mass * scaled).sum(axis=-1)) / shards.sum(mass.sum(axis=-1))
    return shards.argmax(logits), mean - shards.over().take(scaled, following)  # log of the whole mass is in both
