"""Paged keys and values on a TPU: attention that reads the pages that a row may see, and writes into pages, in place.

JAX's own paged kernels do not do: they attend to a call's own tokens too, or to one token a row, and do not return the
logarithm of the softmax's sum, from which the union with other keys and with GPT-OSS's sinks follows.

Both kernels walk a list of steps, several pages of one row each, as long as the rows are filled and no longer. Which
page a step reads is known before it starts (scalar prefetch), so that pages are copied from HBM while the ones before
are computed with. A page that is nowhere is the spare one behind the others.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pipeline.model.layers.tpu_memory import ROW_TILE, VMEM_BYTES, in_hbm

READ_PAGES, WRITE_PAGES = "read_pages", "write_pages"  # the kernels' names in a compiled program
STEP_POSITIONS = 512  # that a step reads
MAX_PAGES = 16  # of a step
QUERY_TILE = 512  # rows of queries that are computed with at a time
MASKED = -1e30  # finite: a row that sees nothing becomes garbage of weight zero, never nan

Ref = Any  # an array in a kernel's memory, read and written in place; Pallas has no public type for it


class _Steps(NamedTuple):
    """Holds the steps of all rows, one after another: whose row each one is, and which of the row's steps is first."""

    row: Int[Array, " most"]
    first: Int[Array, " B"]
    total: Int[Array, ""]


class _Scalars(NamedTuple):
    """Holds what is known before a kernel starts: the steps, the rows' tables, and where their pages begin and end.

    `count` are a row's pages to read, or its tokens to write.
    """

    row: Ref
    offset: Ref
    tables: Ref
    first: Ref
    count: Ref
    start: Ref


class _Sizes(NamedTuple):
    """Holds the sizes of a step's arrays: rows of queries, a head's width, positions of a page."""

    tile: int
    width: int
    page: int


def attend(
    queries: Float[Array, "B T N H"],
    entries: Float[Array, "P G S HH"],
    table: Int[Array, "B M"],
    start: Int[Array, " B"],
    window: int | None,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Returns values and log-sums, float32, of T tokens of each row over the cached positions before `start`.

    Token t of row b is at position start[b] + t; with a `window`, the token at position q sees p > q - window.
    """
    batch, num_tokens, num_heads, width = queries.shape
    num_pages, groups, page_size, _ = entries.shape
    heads = num_heads // groups
    by_head = jnp.transpose((queries * width**-0.5).reshape(batch, num_tokens, groups, heads, width), (0, 2, 1, 3, 4))
    by_head = by_head.reshape(batch, groups, num_tokens * heads, width)
    rows = num_tokens * heads
    tile = min(QUERY_TILE, -(-rows // ROW_TILE) * ROW_TILE)
    tiles = -(-rows // tile)
    by_head = jnp.pad(by_head, [(0, 0), (0, 0), (0, tiles * tile - rows), (0, 0)])
    at_once = max(1, min(MAX_PAGES, STEP_POSITIONS // page_size, table.shape[1]))

    first = jnp.zeros_like(start) if window is None else jnp.maximum(start - window + 1, 0) // page_size
    count = -(-start // page_size) - first  # pages that any of the row's tokens sees
    steps = _steps(jnp.maximum(-(-count // at_once), 1), batch * -(-table.shape[1] // at_once))

    def page(index: int, step: Array, scalars: _Scalars) -> Array:
        owner = scalars.row[step]
        number = (step - scalars.offset[owner]) * at_once + index
        number = jnp.minimum(number, jnp.maximum(scalars.count[owner] - 1, 0))
        number = jnp.minimum(scalars.first[owner] + number, table.shape[1] - 1)
        return jnp.minimum(scalars.tables[owner * table.shape[1] + number], num_pages - 1)

    pages = [
        pl.BlockSpec(
            (1, 1, page_size, 2 * width),
            lambda group, tile, step, *scalars, index=index: (page(index, step, _Scalars(*scalars)), group, 0, 0),
        )
        for index in range(at_once)
    ]

    def of_row(group: Array, tile: Array, step: Array, row: Ref, *_: Ref) -> tuple[Any, ...]:
        return row[step], group, tile, 0

    found = pl.pallas_call(
        functools.partial(_attend, sizes=_Sizes(tile, width, page_size), at_once=at_once, heads=heads, window=window),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=6,
            grid=(groups, tiles, steps.total),
            in_specs=[pl.BlockSpec((1, 1, tile, width), of_row), *pages],
            out_specs=pl.BlockSpec((1, 1, tile, 2 * width), of_row),
            scratch_shapes=[pltpu.VMEM((tile, size), jnp.float32) for size in (width, 128, 128)],
        ),
        out_shape=jax.ShapeDtypeStruct((batch, groups, tiles * tile, 2 * width), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",) * 3, vmem_limit_bytes=VMEM_BYTES),
        interpret=interpret,
        name=READ_PAGES,
    )(
        steps.row,
        steps.first,
        table.reshape(-1),
        first,
        count,
        start,
        by_head,
        *[in_hbm(entries, interpret=interpret)] * at_once,
    )
    found = found[:, :, :rows].reshape(batch, groups, num_tokens, heads, 2 * width)
    found = jnp.transpose(found, (0, 2, 1, 3, 4)).reshape(batch, num_tokens, num_heads, 2 * width)
    return found[..., :width], found[..., width]


def write(
    entries: Float[Array, "P G S HH"],
    new: Float[Array, "B T G HH"],
    table: Int[Array, "B M"],
    start: Int[Array, " B"],
    num_tokens: Int[Array, " B"],
    *,
    interpret: bool = False,
) -> Float[Array, "P G S HH"]:
    """Writes the first `num_tokens` of T tokens of each row to the positions from `start` on, in place.

    `new` has of every head the key, and behind it the value. Rows may not write to one page. Each touched page is read,
    changed and written: HBM takes no single rows of packed values.
    """
    num_pages, groups, page_size, both = entries.shape
    batch, width = new.shape[:2]
    first = start // page_size
    count = jnp.where(num_tokens > 0, (start + num_tokens - 1) // page_size - first + 1, 0)
    most = -(-(width - 1) // page_size) + 1
    steps = _steps(count, batch * most)
    total = jnp.maximum(steps.total, 1)  # one step at least, which then changes nothing
    rows = -(-width // ROW_TILE) * ROW_TILE
    by_head = jnp.pad(jnp.swapaxes(new, 1, 2), [(0, 0), (0, 0), (0, rows - width), (0, 0)])

    def page(step: Array, scalars: _Scalars) -> Array:
        owner = scalars.row[step]
        number = scalars.first[owner] + step - scalars.offset[owner]
        is_inside = (number < table.shape[1]) & (scalars.count[owner] > 0)
        found = scalars.tables[owner * table.shape[1] + jnp.minimum(number, table.shape[1] - 1)]
        return jnp.where(is_inside, jnp.minimum(found, num_pages - 1), num_pages - 1)

    block = pl.BlockSpec((1, groups, page_size, both), lambda step, *scalars: (page(step, _Scalars(*scalars)), 0, 0, 0))
    return pl.pallas_call(
        functools.partial(_write, page_size=page_size, rows=rows),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=6,
            grid=(total,),
            in_specs=[
                pl.BlockSpec((1, groups, rows, both), lambda step, row, *_: (row[step], 0, 0, 0)),
                block,
            ],
            out_specs=block,
        ),
        out_shape=jax.ShapeDtypeStruct(entries.shape, entries.dtype),
        input_output_aliases={7: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_BYTES),
        interpret=interpret,
        name=WRITE_PAGES,
    )(
        steps.row,
        steps.first,
        table.reshape(-1),
        first,
        num_tokens,
        start,
        by_head,
        in_hbm(entries, interpret=interpret),
    )


def _steps(counts: Int[Array, " B"], most: int) -> _Steps:
    """Returns the steps of rows that have `counts` each, of which there are `most` at most."""
    ends = jnp.cumsum(counts)
    row = jnp.searchsorted(ends, jnp.arange(most), side="right")
    return _Steps(jnp.minimum(row, len(counts) - 1).astype(jnp.int32), (ends - counts).astype(jnp.int32), ends[-1])


def _attend(*refs: Ref, sizes: _Sizes, at_once: int, heads: int, window: int | None) -> None:
    scalars, queries, *pages, out, values, peak, total = _Scalars(*refs[:6]), *refs[6:]
    step, query_tile = pl.program_id(2), pl.program_id(1)
    owner = scalars.row[step]
    number = step - scalars.offset[owner]
    first, count, start = scalars.first[owner], scalars.count[owner], scalars.start[owner]
    tile, width, page_size = sizes

    @pl.when(number == 0)
    def _begin() -> None:
        values[...] = jnp.zeros_like(values)
        peak[...] = jnp.full_like(peak, MASKED)
        total[...] = jnp.zeros_like(total)

    @pl.when(number * at_once < count)
    def _add() -> None:
        entries = jnp.concatenate([page[0, 0] for page in pages], axis=0)  # [positions, 2H]
        length = at_once * page_size
        begins = (first + number * at_once) * page_size
        down = begins + jax.lax.broadcasted_iota(jnp.int32, (length, 1), 0)
        entries = jnp.where(down < start, entries, 0)  # what is not filled may hold anything
        keys, held = entries[:, :width], entries[:, width:]
        scores = jax.lax.dot_general(
            queries[0, 0],
            keys,
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
            precision=_precision(keys),
        )
        positions = begins + jax.lax.broadcasted_iota(jnp.int32, (tile, length), 1)
        visible = positions < start
        if window is not None:
            rows = query_tile * tile + jax.lax.broadcasted_iota(jnp.int32, (tile, length), 0)
            tokens = jnp.floor((rows.astype(jnp.float32) + 0.5) / heads).astype(
                jnp.int32
            )  # whole numbers do not divide
            visible &= positions > start + tokens - window
        scores = jnp.where(visible, scores, MASKED)
        before = peak[:, :1]
        highest = jnp.maximum(before, scores.max(axis=1, keepdims=True))
        weights = jnp.where(visible, jnp.exp(scores - highest), 0.0)
        shrunk = jnp.exp(before - highest)
        added = jax.lax.dot_general(
            weights.astype(held.dtype),
            held,
            (((1,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
            precision=_precision(held),
        )
        values[...] = values[...] * shrunk + added
        total[...] = jnp.broadcast_to(total[:, :1] * shrunk + weights.sum(axis=1, keepdims=True), total.shape)
        peak[...] = jnp.broadcast_to(highest, peak.shape)

    @pl.when((number + 1) * at_once >= count)
    def _end() -> None:
        summed = total[:, :1]
        is_empty = summed <= 0
        log_sum = jnp.where(is_empty, MASKED, peak[:, :1] + jnp.log(jnp.where(is_empty, 1.0, summed)))
        out[0, 0, :, :width] = values[...] / jnp.where(is_empty, 1.0, summed)
        out[0, 0, :, width:] = jnp.broadcast_to(log_sum, (tile, width))


def _write(*refs: Ref, page_size: int, rows: int) -> None:
    scalars, new, old, out = _Scalars(*refs[:6]), *refs[6:]
    step = pl.program_id(0)
    owner = scalars.row[step]
    number = scalars.first[owner] + step - scalars.offset[owner]
    begins = number * page_size - scalars.start[owner]  # the page's first position, as a token
    tokens = begins + jax.lax.broadcasted_iota(jnp.int32, (page_size, rows), 0)
    is_from = tokens == jax.lax.broadcasted_iota(jnp.int32, (page_size, rows), 1)
    down = begins + jax.lax.broadcasted_iota(jnp.int32, (page_size, 1), 0)
    is_new = (down >= 0) & (down < scalars.count[owner])
    for group in range(new.shape[1]):
        fresh = jax.lax.dot_general(  # one 1 in each row: the token itself, whatever its precision
            is_from.astype(new.dtype),
            new[0, group],
            (((1,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
            precision=_precision(new),
        )
        out[0, group] = jnp.where(is_new, fresh.astype(out.dtype), old[0, group])


def _precision(array: Any) -> jax.lax.Precision:
    return jax.lax.Precision.HIGHEST if array.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
