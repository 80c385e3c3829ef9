"""Keys and values of positions that are already computed, in pages, for the target and for the draft.

A layer's pages lie in one array. A table tells, for every row of a call, which page holds positions 0..S-1 of the row,
which the next S positions, and so on; rows that begin with the same tokens may share pages. The pages do not say how
many of their positions are committed: a caller passes the position at which its tokens start, and sees of the cache
only positions before that; its own tokens it attends to by themselves. So dropping rejected tokens means no more than
starting the next call earlier.

An entry that is not filled may hold anything finite. Behind the pages of an array lies a spare one, where everything
goes that has no page.
"""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from pipeline.model.layers import page_kernels
from pipeline.model.layers.pytree import pytree_dataclass
from pipeline.model.parallel.execution import DEFAULT_EXECUTION, PALLAS_BACKENDS, Execution, KernelBackend

NOWHERE = 2**30  # past every array's last page; the last one is meant


@pytree_dataclass()
class PagedLayer:
    """Holds one layer's pages of S positions, P with the spare one: of every head the key, and behind it the value."""

    entries: Float[Array, "P G S HH"]


@pytree_dataclass()
class PagedCache:
    """Holds the pages of all layers."""

    layers: tuple[PagedLayer, ...]


@pytree_dataclass()
class PageTables:
    """Holds the pages of B rows, of layers that see everything and of those with a sliding window.

    Page m of a row holds positions m * S to m * S + S - 1. Where a row has no page it has NOWHERE: nothing is written
    there, and its positions must not be seen.
    """

    whole: Int[Array, "B M"]
    sliding: Int[Array, "B M"]


def empty(num_pages: int, num_heads: int, page_size: int, head_dim: int, dtype: DTypeLike) -> PagedLayer:
    """Returns a layer's pages and the spare one, full of zeros."""
    return PagedLayer(jnp.zeros((num_pages + 1, num_heads, page_size, 2 * head_dim), dtype))


def pages_for(num_positions: int, page_size: int) -> int:
    """Returns how many pages hold so many positions."""
    return -(-num_positions // page_size)


def consecutive_tables(num_rows: int, num_positions: int, page_size: int) -> PageTables:
    """Returns the tables of rows that share no page: each has the next pages, for `num_positions` positions."""
    pages = pages_for(num_positions, page_size)
    table = jnp.arange(num_rows * pages, dtype=jnp.int32).reshape(num_rows, pages)
    return PageTables(table, table)


def write(
    layer: PagedLayer,
    keys: Float[Array, "B T G H"],
    values: Float[Array, "B T G H"],
    table: Int[Array, "B M"],
    start: Int[Array, " B"],
    num_tokens: Int[Array, " B"] | None = None,
    *,
    execution: Execution = DEFAULT_EXECUTION,
) -> PagedLayer:
    """Writes the first `num_tokens` (None: all) of T positions of each row, the first at position `start`.

    Positions without a page are lost. Rows may not write to one page.
    """
    width = keys.shape[1]
    counts = jnp.full(start.shape, width, start.dtype) if num_tokens is None else num_tokens
    new = jnp.concatenate([keys, values], axis=-1).astype(layer.entries.dtype)
    if execution.backend in PALLAS_BACKENDS:
        interpret = execution.backend is KernelBackend.pallas_interpreted
        return PagedLayer(page_kernels.write(layer.entries, new, table, start, counts, interpret=interpret))
    num_pages, _, page_size, _ = layer.entries.shape
    positions = start[:, None] + jnp.arange(width)
    inside = (jnp.arange(width) < counts[:, None]) & (positions < table.shape[1] * page_size)
    pages = jnp.take_along_axis(table, jnp.minimum(positions // page_size, table.shape[1] - 1), axis=1)
    pages = jnp.minimum(jnp.where(inside, pages, NOWHERE), num_pages - 1)
    return PagedLayer(layer.entries.at[pages, :, positions % page_size].set(new))


def take(layer: PagedLayer, pages: Int[Array, "B m"]) -> tuple[Float[Array, "B m_S G H"], Float[Array, "B m_S G H"]]:
    """Returns keys and values [B, m S, G, H] of some pages of each row, end to end; of a page that is nowhere, any."""
    taken = jnp.moveaxis(jnp.take(layer.entries, pages, axis=0, mode="clip"), 2, 3)  # [B, m, S, G, 2H]
    taken = taken.reshape(len(pages), -1, *taken.shape[3:])
    width = taken.shape[-1] // 2
    return taken[..., :width], taken[..., width:]


def active_only(tables: PageTables, active: Bool[Array, " B"]) -> PageTables:
    """Returns the tables in which rows that are not active have no page."""
    return PageTables(*(jnp.where(active[:, None], table, NOWHERE) for table in (tables.whole, tables.sliding)))
