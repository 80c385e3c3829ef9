"""Tokens drawn from a distribution over the vocabulary, with a key for each row; alike on any number of shards."""

import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from pipeline.model.parallel.shards import Shards

ORDER_BITS = 32  # of a float32, over which `nucleus` and `likeliest` search
SIGN = np.uint32(2**31)  # the sign bit of a float32


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Holds how tokens are drawn: from softmax(logits / temperature), cut to the likeliest tokens that hold `top_p`."""

    temperature: float
    top_p: float = 1.0


def sampling_key(seed: int, name: str) -> tuple[int, int]:
    """Returns the key of the text called `name` in a run of `seed`, which decides its draws with model and prompt."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return int.from_bytes(digest[:4]), int.from_bytes(digest[4:8])


def noise(
    keys: UInt32[Array, "B two"], positions: Int[Array, " B"], num_local: int, shards: Shards
) -> Float[Array, "B local"]:
    """Returns standard Gumbel noise [B, W] for every row and every token of this shard's part of the vocabulary.

    The noise of a token depends on the row's key, the position and the token's id alone. argmax(logits / temperature +
    noise) is a token drawn from the softmax. The noise is made of 32 random bits each: `jax.random.gumbel` has 23, too
    few for the tail of 201,088 tokens.
    """
    token_ids = shards.over().offset(num_local) + jnp.arange(num_local, dtype=jnp.uint32)

    def of_row(key: UInt32[Array, " two"], position: Int[Array, ""]) -> UInt32[Array, " local"]:
        at_position = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), position)
        bits = jax.vmap(lambda token_id: jax.random.key_data(jax.random.fold_in(at_position, token_id)))(token_ids)
        return bits[:, 0] ^ bits[:, 1]  # as jax.random.bits does

    uniform = (jax.vmap(of_row)(keys, positions).astype(jnp.float32) + 0.5) * 2.0**-32
    return -jnp.log(-jnp.log1p(-jnp.minimum(uniform, 1 - 2.0**-24)))  # exact where it is large


def nucleus(
    logits: Float[Array, "B local"], top_p: float | Float[Array, " B"], shards: Shards
) -> Bool[Array, "B local"]:
    """Returns which tokens [B, W] are among the fewest, the likeliest first, that hold `top_p` of the probability.

    A token is in the nucleus when the likelier tokens hold less than `top_p`; equally likely tokens are in or out
    together. With a `top_p` of 1 every token is.
    """
    if isinstance(top_p, float) and top_p >= 1:
        return jnp.ones(logits.shape, bool)
    weights = jnp.exp(logits - shards.over().max(logits.max(axis=-1))[:, None])
    found = _likeliest(logits, weights, top_p * shards.sum(weights.sum(axis=-1)), shards)
    return found if isinstance(top_p, float) else found | (top_p >= 1)[:, None]


def likeliest(logits: Float[Array, "B local"], counts: Int[Array, " B"], shards: Shards) -> Bool[Array, "B local"]:
    """Returns which tokens [B, W] are among the `counts` likeliest ones; equally likely ones are in or out together."""
    return _likeliest(logits, jnp.ones(logits.shape, jnp.float32), counts.astype(jnp.float32), shards)


def _likeliest(
    logits: Float[Array, "B local"], weights: Float[Array, "B local"], wanted: Float[Array, " B"], shards: Shards
) -> Bool[Array, "B local"]:
    """Returns the fewest tokens, the likeliest first, whose weights add up to `wanted`.

    Bisection over the bits of a float32 finds the last one: sorting 201,088 logits costs many times as much.
    """
    order = _ordered(logits)

    def with_bit(index: Int[Array, ""], least: UInt32[Array, " B"]) -> UInt32[Array, " B"]:
        higher = least | (jnp.uint32(1) << (ORDER_BITS - 1 - index).astype(jnp.uint32))
        held = shards.sum(jnp.where(order >= higher[:, None], weights, 0).sum(axis=-1))
        return jnp.where(held >= wanted, higher, least)

    least = jax.lax.fori_loop(0, ORDER_BITS, with_bit, jnp.zeros(len(logits), jnp.uint32))
    return order >= least[:, None]


def _ordered(values: Float[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Returns unsigned integers that have the order of float32 values."""
    values = jnp.where(values == 0, 0, values)  # -0.0 is 0.0
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32)
    return jnp.where(bits >= SIGN, ~bits, bits | SIGN)
