"""The TPU's kernels over pages, interpreted, against plain loops in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipeline.model.layers import page_kernels
from pipeline.model.layers.kv_pages import NOWHERE


def attend(queries, entries, table, start, window):
    program = jax.jit(functools.partial(page_kernels.attend, window=window, interpret=True))
    return program(queries, entries, table, start)


write = jax.jit(functools.partial(page_kernels.write, interpret=True))


def drawn(seed, *shape, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def tables_of(starts, extra, page_size, width, seed=0):
    """Pages in any order for so many positions of each row, and how many there are in all."""
    counts = [-(-(start + extra) // page_size) for start in starts]
    order = np.random.default_rng(seed).permutation(sum(counts))
    table = np.full((len(starts), width), NOWHERE, np.int32)
    used = 0
    for row, count in enumerate(counts):
        table[row, :count] = order[used : used + count]
        used += count
    return table, used


def attended(queries, entries, table, start, window):
    """Softmax over what each token sees of the cache, one at a time, and the logarithm of its sum."""
    batch, length, num_heads, width = queries.shape
    page_size, heads = entries.shape[2], num_heads // entries.shape[1]
    values, log_sums = np.zeros(queries.shape), np.full(queries.shape[:3], -1e30)
    for row, token, head in np.ndindex(batch, length, num_heads):
        at = start[row] + token
        seen = [p for p in range(start[row]) if window is None or p > at - window]
        if seen:
            held = np.array([entries[table[row, p // page_size], head // heads, p % page_size] for p in seen])
            scores = held[:, :width] @ queries[row, token, head] * width**-0.5
            weights = np.exp(scores - scores.max())
            values[row, token, head] = weights @ held[:, width:] / weights.sum()
            log_sums[row, token, head] = scores.max() + np.log(weights.sum())
    return values, log_sums


SHAPES = {
    "a step": (1, [0, 5, 70, 33], None),
    "a block": (8, [0, 16, 61, 1], None),
    "a step in a window": (1, [0, 5, 70, 33], 24),
    "a block in a window": (8, [3, 16, 61, 0], 24),
    "a chunk": (40, [0, 50], None),
    "a chunk in a window": (40, [64, 7], 24),
}


CASES = [(2, 3, 16, name) for name in SHAPES] + [(1, 8, 64, "a block in a window")]


@pytest.mark.parametrize(("groups", "heads", "width", "shape"), CASES)
def test_pages_are_attended_to_as_in_a_loop(groups, heads, width, shape, monkeypatch):
    monkeypatch.setattr(page_kernels, "STEP_POSITIONS", 32)  # two pages a step: rows take several
    monkeypatch.setattr(page_kernels, "QUERY_TILE", 64)
    length, starts, window = SHAPES[shape]
    start = np.array(starts)
    table, used = tables_of(starts, 0, 16, 6)
    entries = drawn(1, used + 1, groups, 16, 2 * width)
    clean = entries.copy()
    for row, count in enumerate(starts):
        if count % 16:
            entries[table[row, count // 16], :, count % 16 :] = np.nan  # nothing is filled there
    entries[used] = np.nan  # the spare page
    queries = drawn(2, len(starts), length, groups * heads, width)
    found = attend(jnp.asarray(queries), jnp.asarray(entries), jnp.asarray(table), jnp.asarray(start), window)
    wanted = attended(queries, clean, table, start, window)
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[0], wanted[0], rtol=0, atol=1e-5)


def test_rows_may_share_pages_and_bfloat16_is_read():
    start = np.array([40, 44])
    table = np.array([[3, 0, 5, NOWHERE], [3, 0, 1, NOWHERE]], np.int32)
    entries = jnp.asarray(drawn(1, 7, 2, 16, 32), jnp.bfloat16)
    queries = jnp.asarray(drawn(2, 2, 4, 4, 16), jnp.bfloat16)
    found = attend(queries, entries, jnp.asarray(table), jnp.asarray(start), None)
    wanted = attended(*(np.asarray(one, np.float32) for one in (queries, entries)), table, start, None)
    np.testing.assert_allclose(found[0], wanted[0], rtol=0, atol=2e-2)
    np.testing.assert_allclose(found[1], wanted[1], rtol=0, atol=3e-2)


def written(entries, new, table, start, counts):
    entries = entries.copy()
    for row, count in enumerate(counts):
        for token in range(count):
            number, offset = divmod(int(start[row]) + token, entries.shape[2])
            if number < table.shape[1] and table[row, number] < len(entries) - 1:
                entries[table[row, number], :, offset] = new[row, token]
    return entries


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("length", "starts", "counts"),
    [
        (1, [0, 15, 16, 40], [1, 1, 0, 1]),
        (8, [0, 12, 33, 88], [8, 8, 0, 8]),  # the last row passes the table's end
        (50, [7, 0, 16, 3], [50, 1, 33, 16]),
    ],
    ids=["a step", "a block", "a chunk"],
)
def test_tokens_are_written_where_they_belong_and_nothing_else_changes(length, starts, counts, dtype):
    table, used = tables_of(starts, length, 16, 6)
    table[1, 1:] = NOWHERE  # a row that has too few pages loses what does not fit
    before, new = drawn(0, used + 1, 2, 16, 32, dtype=dtype), drawn(1, 4, length, 2, 32, dtype=dtype)
    arrays = [jnp.asarray(one) for one in (table, starts, counts)]
    found = np.asarray(write(jnp.asarray(before), jnp.asarray(new), *arrays))
    wanted = written(before, new, table, np.array(starts), counts)
    assert (found[:-1] == wanted[:-1]).all()
    assert (wanted[:-1] != before[:-1]).any()


def test_nothing_to_write_writes_nothing():
    before = drawn(0, 4, 2, 16, 32)
    table, zeros = jnp.zeros((2, 3), jnp.int32), jnp.zeros(2, jnp.int32)
    found = write(jnp.asarray(before), jnp.asarray(drawn(1, 2, 8, 2, 32)), table, zeros, zeros)
    assert (np.asarray(found)[:-1] == before[:-1]).all()
