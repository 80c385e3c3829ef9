"""What the target says itself behind every token of a text, and how far the text's next token is from that."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from pipeline.model.layers import sampling
from pipeline.model.layers.sampling import Sampling
from pipeline.model.parallel.shards import Shards

NUCLEUS_SLACK = {"float32": 1e-4, "bfloat16": 0.02}  # what sums in another order make of the mass above a token
LEAST_TOP_P = 1e-9

Choice = tuple[Int[Array, " T"], Float[Array, " T"]]


def choice(
    logits: Float[Array, "T local"],
    following: Int[Array, " T"],
    keys: UInt32[Array, "T two"] | None,
    positions: Int[Array, " T"],
    drawn: Sampling | None,
    precision: str,
    shards: Shards,
) -> Choice:
    """The target's tokens and the shortfalls (`capture.Captured`) of the text's, which are `following`.

    `positions` are those of the text's tokens, `keys` what they were `drawn` with, where that is known.
    """
    if drawn is None:
        return _greedy(logits, following, shards)
    if keys is None:
        return _drawn_elsewhere(logits, following, drawn, shards)
    return _drawn(logits, following, keys, positions, drawn, NUCLEUS_SLACK[precision], shards)


def _greedy(logits: Float[Array, "T local"], following: Int[Array, " T"], shards: Shards) -> Choice:
    return shards.argmax(logits), shards.over().max(logits.max(axis=-1)) - shards.over().take(logits, following)


def _drawn(
    logits: Float[Array, "T local"],
    following: Int[Array, " T"],
    keys: UInt32[Array, "T two"],
    positions: Int[Array, " T"],
    how: Sampling,
    slack: float,
    shards: Shards,
) -> Choice:
    """What the text's own noise chooses here, and how far the text's token lies below that.

    The nucleus ends where masses differ by rounding: a token may be in it here and was not where the text was
    written. So the choice is made from a nucleus that is smaller by `slack`, and the text's token may lie in one that
    is larger. A token outside of that one has its distance from the most likely.
    """
    scaled = logits / how.temperature
    noisy = scaled + sampling.noise(keys, positions, logits.shape[-1], shards)
    own, own_noisy = shards.over().take(scaled, following), shards.over().take(noisy, following)
    top_p = how.top_p if how.top_p >= 1 else max(how.top_p - slack, LEAST_TOP_P)
    among = jnp.where(sampling.nucleus(scaled, top_p, shards), noisy, -jnp.inf)
    shortfall = jnp.maximum(shards.over().max(among.max(axis=-1)) - own_noisy, 0)
    if how.top_p < 1:
        best = shards.over().max(scaled.max(axis=-1))
        mass = jnp.exp(scaled - best[:, None])
        above = shards.sum(jnp.where(scaled > own[:, None], mass, 0).sum(axis=-1)) / shards.sum(mass.sum(axis=-1))
        shortfall = jnp.where(above < how.top_p + slack, shortfall, best - own)
    return shards.argmax(among), how.temperature * shortfall


def _drawn_elsewhere(
    logits: Float[Array, "T local"], following: Int[Array, " T"], how: Sampling, shards: Shards
) -> Choice:
    """The most likely token, and -log p of the text's less the mean of -log p over what the target would draw."""
    scaled = logits / how.temperature
    scaled = scaled - shards.over().max(scaled.max(axis=-1))[:, None]
    mass = jnp.where(sampling.nucleus(scaled, how.top_p, shards), jnp.exp(scaled), 0)
    mean = shards.sum((mass * scaled).sum(axis=-1)) / shards.sum(mass.sum(axis=-1))
    return shards.argmax(logits), mean - shards.over().take(scaled, following)  # log of the whole mass is in both
