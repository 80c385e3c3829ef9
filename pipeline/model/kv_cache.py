"""Keys and values of positions already computed, for the target and for the draft.

Position p of row b lies in slot p. How much of a row is committed is not stored here: a caller passes
where its tokens start, attention sees no slot at or after a query's own position unless this very call
wrote it, and so dropping rejected tokens means no more than starting the next call earlier.
"""

import dataclasses
from typing import no_type_check

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int


@no_type_check  # JAX rebuilds it around shapes, masks and gradients too
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """One layer's keys and values."""

    keys: Float[Array, "B S G H"]
    values: Float[Array, "B S G H"]


@no_type_check  # JAX rebuilds it around shapes, masks and gradients too
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """All layers' keys and values."""

    layers: tuple[LayerCache, ...]

    @property
    def num_positions(self) -> int:
        """S: slots in a row."""
        return self.layers[0].keys.shape[1]


def empty(num_layers: int, batch: int, num_positions: int, num_heads: int, head_dim: int, dtype: DTypeLike) -> KVCache:
    """A cache of zeros. Every write must end at or before `num_positions`."""
    shape = (batch, num_positions, num_heads, head_dim)
    return KVCache(tuple(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(num_layers)))


def write(
    layer: LayerCache, keys: Float[Array, "B T G H"], values: Float[Array, "B T G H"], start: Int[Array, " B"]
) -> LayerCache:
    """Put T positions of each row at slots start..start+T-1; start + T must not pass the row's end."""
    put = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice_in_dim(row, new, at, axis=0))
    return LayerCache(
        put(layer.keys, keys.astype(layer.keys.dtype), start),
        put(layer.values, values.astype(layer.values.dtype), start),
    )


def take_rows(cache: KVCache, rows: Int[Array, " R"]) -> KVCache:
    """The rows named, as a cache of their own; out-of-range rows repeat the last one."""
    return jax.tree.map(lambda array: jnp.take(array, rows, axis=0, mode="clip"), cache)


def put_rows(cache: KVCache, rows: Int[Array, " R"], part: KVCache) -> KVCache:
    """The inverse of `take_rows`; out-of-range rows are dropped."""
    return jax.tree.map(lambda array, new: array.at[rows].set(new, mode="drop"), cache, part)
