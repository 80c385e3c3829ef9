"""Keys and values of positions that are already computed, for the target and for the draft.

Position p of a row is in entry p modulo the row's number of entries: a layer that sees everything has an entry for
every position, one with a sliding window has a ring. The cache does not store how much of a row is committed: a caller
passes the position at which its tokens start, and sees of the cache only positions before that; its own tokens it
attends to by themselves. So dropping rejected tokens means no more than starting the next call earlier, as long as a
ring has `rollback` more entries than its window.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pipeline.model.layers.pytree import pytree_dataclass

FEW_POSITIONS = 32  # up to so many are selected one by one, which is faster on a TPU than a gather


@pytree_dataclass()
class LayerCache:
    """Holds one layer's keys and values: R rows of S entries."""

    keys: Float[Array, "R S G H"]
    values: Float[Array, "R S G H"]


@pytree_dataclass()
class KVCache:
    """Holds all layers' keys and values; each row serves one request."""

    layers: tuple[LayerCache, ...]


def empty(num_entries: Sequence[int], num_rows: int, num_heads: int, head_dim: int, dtype: DTypeLike) -> KVCache:
    """Returns a cache of zeros; `num_entries` has the entries of each layer's rows."""
    shapes = [(num_rows, count, num_heads, head_dim) for count in num_entries]
    return KVCache(tuple(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for shape in shapes))


def entry_positions(start: Int[Array, " B"], num_entries: int) -> Int[Array, "B S"]:
    """Returns the position [B, S] in every entry of rows that are filled up to `start`; negative in an empty entry."""
    last = start[:, None] - 1
    return last - (last - jnp.arange(num_entries)) % num_entries


def take_rows(array: Float[Array, "R S G H"], rows: Int[Array, " B"] | None) -> Float[Array, "B S G H"]:
    """Returns rows [B, S, G, H] by index, or all in order when None; an index past the last row gives any row."""
    return array if rows is None else jnp.take(array, rows, axis=0, mode="clip")


def write(
    layer: LayerCache,
    keys: Float[Array, "B T G H"],
    values: Float[Array, "B T G H"],
    start: Int[Array, " B"],
    rows: Int[Array, " B"] | None,
) -> LayerCache:
    """Writes T positions of each row to the entries start..start+T-1, which must not pass the row's end.

    `rows` are the indices of the cache's rows, None for all in order; an index past the last row is dropped.
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
    """Writes the first `num_tokens` of T positions (None: all) of each row to a ring, over the oldest entries.

    `rows` are as in `write`. Padding must not be written: it would overwrite positions that the window still shows.
    """
    num_entries, width = layer.keys.shape[1], keys.shape[1]
    end = start + (width if num_tokens is None else num_tokens)
    new = entry_positions(end, num_entries) - start[:, None]  # which of the T tokens each entry gets, negative for none
    new = new[..., None, None]

    def put(old: Float[Array, "R S G H"], fresh: Float[Array, "B T G H"]) -> Float[Array, "R S G H"]:
        mixed, fresh = take_rows(old, rows), fresh.astype(old.dtype)
        if width <= FEW_POSITIONS:
            for index in range(width):
                mixed = jnp.where(new == index, fresh[:, index : index + 1], mixed)
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
    indices = jnp.stack([rows, start], axis=1)
    mode = jax.lax.GatherScatterMode.FILL_OR_DROP
    return jax.lax.scatter(old, indices, new.astype(old.dtype), numbers, unique_indices=True, mode=mode)
