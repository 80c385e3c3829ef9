"""Keys and values of positions already computed, for the target and for the draft.

Position p of a row lies in slot p modulo the row's slots: a layer that sees everything has a slot for every
position, one with a sliding window has a ring. How much of a row is committed is not stored here: a caller passes
where its tokens start, what a call computes itself is attended to before it is written, and of the cache only
positions before the start are seen. So dropping rejected tokens means no more than starting the next call
earlier, as long as a ring is `rollback` slots longer than its window.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pipeline.model.layers.pytree import pytree_dataclass

FEW_POSITIONS = 32  # up to so many are chosen one by one, which a TPU does faster than to look them up


@pytree_dataclass()
class LayerCache:
    """One layer's keys and values."""

    keys: Float[Array, "R S G H"]
    values: Float[Array, "R S G H"]


@pytree_dataclass()
class KVCache:
    """All layers' keys and values; `R` rows, one per request."""

    layers: tuple[LayerCache, ...]


def empty(slots: Sequence[int], num_rows: int, num_heads: int, head_dim: int, dtype: DTypeLike) -> KVCache:
    """A cache of zeros whose layers have `slots` positions each."""
    shapes = [(num_rows, count, num_heads, head_dim) for count in slots]
    return KVCache(tuple(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for shape in shapes))


def entry_positions(start: Int[Array, " B"], num_slots: int) -> Int[Array, "B S"]:
    """The position in every slot of rows that are filled up to `start`; negative where there is none yet."""
    last = start[:, None] - 1
    return last - (last - jnp.arange(num_slots)) % num_slots


def take_rows(array: Float[Array, "R S G H"], rows: Int[Array, " B"] | None) -> Float[Array, "B S G H"]:
    """The rows named (all of them, in order, when None); a number past the last row gives some row."""
    return array if rows is None else jnp.take(array, rows, axis=0, mode="clip")


def write(
    layer: LayerCache,
    keys: Float[Array, "B T G H"],
    values: Float[Array, "B T G H"],
    start: Int[Array, " B"],
    rows: Int[Array, " B"] | None,
) -> LayerCache:
    """Put T positions of each row at slots start..start+T-1, which must not pass the row's end.

    `rows` are the cache's rows, None for all in order; a number past the last row is dropped.
    """
    rows = jnp.arange(keys.shape[0]) if rows is None else rows
    return LayerCache(_put(layer.keys, keys, rows, start), _put(layer.values, values, rows, start))


def write_ring(
    layer: LayerCache,
    keys: Float[Array, "B T G H"],
    values: Float[Array, "B T G H"],
    start: Int[Array, " B"],
    rows: Int[Array, " B"] | None,
    num_tokens: Int[Array, " B"] | None,
) -> LayerCache:
    """As `write` for a ring: of the positions that count (`num_tokens`, None for all T) the last overwrite older ones.

    Padding must not be written here: it would overwrite positions that the window still shows.
    """
    num_slots, width = layer.keys.shape[1], keys.shape[1]
    end = start + (width if num_tokens is None else num_tokens)
    new = entry_positions(end, num_slots) - start[:, None]  # of each slot: which of the T tokens, negative for none
    new = new[..., None, None]

    def put(old: Float[Array, "R S G H"], fresh: Float[Array, "B T G H"]) -> Float[Array, "R S G H"]:
        mixed, fresh = take_rows(old, rows), fresh.astype(old.dtype)
        if width <= FEW_POSITIONS:
            for place in range(width):
                mixed = jnp.where(new == place, fresh[:, place : place + 1], mixed)
        else:
            mixed = jnp.where(new >= 0, jnp.take_along_axis(fresh, jnp.clip(new, 0, width - 1), axis=1), mixed)
        return mixed if rows is None else old.at[rows].set(mixed, mode="drop")

    return LayerCache(put(layer.keys, keys), put(layer.values, values))


def _put(
    old: Float[Array, "R S G H"], new: Float[Array, "B T G H"], rows: Int[Array, " B"], start: Int[Array, " B"]
) -> Float[Array, "R S G H"]:
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2, 3), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0, 1)
    )
    at = jnp.stack([rows, start], axis=1)
    mode = jax.lax.GatherScatterMode.FILL_OR_DROP
    return jax.lax.scatter(old, at, new.astype(old.dtype), numbers, unique_indices=True, mode=mode)
