"""Attention in parts against one softmax in NumPy, and kernels against the parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipeline.model.layers import attention, attention_kernels, kv_pages
from pipeline.model.layers.attention import Part
from pipeline.model.parallel.execution import Execution, KernelBackend

pytestmark = pytest.mark.usefixtures("compiled_quickly")

NUM_HEADS, GROUPS, WIDTH = 6, 2, 16
CASES = {"all before": None, "window": 7, "window as long as a tile": 128}


def drawn(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def whole(queries, keys, values, positions, key_positions, window, sinks):
    """One row at a time: softmax over what is visible and the sink."""
    outputs = np.zeros_like(queries)
    for row, token, head in np.ndindex(*queries.shape[:3]):
        at = positions[row][token]
        seen = [s for s, p in enumerate(key_positions[row]) if 0 <= p <= at and (window is None or p > at - window)]
        group = head // (NUM_HEADS // GROUPS)
        scores = keys[row, seen, group] @ queries[row, token, head] / np.sqrt(WIDTH)
        weights = np.exp(np.append(scores, sinks[head]) - max(scores.max(initial=-np.inf), sinks[head]))
        outputs[row, token, head] = (weights[:-1, None] * values[row, seen, group]).sum(0) / weights.sum()
    return outputs


def in_pages(keys, values, table, page_size, num_pages):
    """Pages that hold a row's positions where its table says so, and something finite everywhere else."""
    entries = np.full((num_pages + 1, GROUPS, page_size, 2 * WIDTH), 7.0, np.float32)
    for row, position in np.ndindex(*keys.shape[:2]):
        page = table[row][position // page_size]
        if page < num_pages:
            entries[page, :, position % page_size] = np.concatenate([keys[row, position], values[row, position]], -1)
    return kv_pages.PagedLayer(jnp.asarray(entries))


@pytest.mark.parametrize("window", [None, 5], ids=["full", "sliding"])
@pytest.mark.parametrize("chunk", [4, 256], ids=["a page at a time", "all at once"])
def test_cache_and_own_tokens_and_sinks_are_one_softmax(monkeypatch, window, chunk):
    monkeypatch.setattr(attention, "CACHE_CHUNK", chunk)
    start, width, length = np.array([0, 4, 13]), 3, 16
    table = np.array([[kv_pages.NOWHERE] * 4, [6, 2, kv_pages.NOWHERE, kv_pages.NOWHERE], [5, 0, 7, 1]], np.int32)
    keys, values, sinks = drawn(0, 3, length, GROUPS, WIDTH), drawn(1, 3, length, GROUPS, WIDTH), drawn(2, NUM_HEADS)
    queries = drawn(3, 3, width, NUM_HEADS, WIDTH)
    cached = in_pages(keys, values, table, 4, 8)
    own = [np.stack([source[row, at : at + width] for row, at in enumerate(start)]) for source in (keys, values)]
    parts = [
        attention.over_own(jnp.asarray(queries), *map(jnp.asarray, own), window),
        attention.over_cache(jnp.asarray(queries), cached, jnp.asarray(table), jnp.asarray(start), window),
    ]
    found = attention.union(parts, jnp.asarray(sinks))
    positions = start[:, None] + np.arange(width)
    seen_to = [np.where(np.arange(length) < start[row] + width, np.arange(length), -1) for row in range(3)]
    expected = whole(queries, keys, values, positions, seen_to, window, sinks)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_pages_past_the_longest_row_are_not_read(monkeypatch):
    monkeypatch.setattr(attention, "CACHE_CHUNK", 128)
    queries, start = jnp.asarray(drawn(0, 2, 1, NUM_HEADS, WIDTH)), jnp.asarray([5, 200])
    tables = kv_pages.consecutive_tables(2, 512, 32)
    entries = drawn(1, tables.whole.size + 1, GROUPS, 32, 2 * WIDTH)
    entries[tables.whole[:, 8:].ravel()] = np.nan  # 0 x nan would show
    found = attention.over_cache(queries, kv_pages.PagedLayer(jnp.asarray(entries)), tables.whole, start, None)
    assert np.isfinite(found.values).all()


def test_what_is_written_is_read_back_and_nothing_else_changes():
    table = jnp.asarray([[3, 0, 5], [kv_pages.NOWHERE] * 3, [1, 4, kv_pages.NOWHERE]], jnp.int32)
    start, counts = jnp.asarray([2, 0, 6]), jnp.asarray([7, 7, 3])
    before = drawn(0, 7, GROUPS, 4, 2 * WIDTH)  # the last page is the spare one
    keys, values = drawn(1, 3, 7, GROUPS, WIDTH), drawn(2, 3, 7, GROUPS, WIDTH)
    layer = kv_pages.PagedLayer(jnp.asarray(before))
    after = kv_pages.write(layer, jnp.asarray(keys), jnp.asarray(values), table, start, counts)
    expected = before.copy()
    for row in (0, 2):
        for token in range(counts[row]):
            position = int(start[row]) + token
            page = int(table[row, position // 4])
            if page < 6:  # the last token of the last row has no page
                expected[page, :, position % 4] = np.concatenate([keys[row, token], values[row, token]], -1)
    assert (np.asarray(after.entries)[:6] == expected[:6]).all()
    assert (expected != before).any()
    found_keys, found_values = kv_pages.take(after, table[:1])
    np.testing.assert_array_equal(found_keys[0, 2:9], keys[0])
    np.testing.assert_array_equal(found_values[0, 2:9], values[0])


@pytest.mark.parametrize("window", CASES.values(), ids=CASES.keys())
def test_long_rows_in_runs_of_queries_equal_all_at_once(monkeypatch, window):
    arrays = [jnp.asarray(drawn(seed, 2, 300, heads, WIDTH)) for seed, heads in enumerate((NUM_HEADS, GROUPS, GROUPS))]
    at_once = attention.over_own(*arrays, window)
    monkeypatch.setattr(attention, "MAX_SCORES", 2 * NUM_HEADS * 300 * 70)
    in_runs = attention.over_own(*arrays, window)
    np.testing.assert_allclose(in_runs.values, at_once.values, rtol=0, atol=1e-5)
    np.testing.assert_allclose(in_runs.log_sum, at_once.log_sum, rtol=0, atol=1e-5)


KERNELS = {
    "splash attention": lambda *arrays: attention_kernels.on_tpu(*arrays, interpret=True),
    "jax.nn": lambda *arrays: attention_kernels.on_gpu(*arrays, implementation="xla"),
}


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
@pytest.mark.parametrize("window", CASES.values(), ids=CASES.keys())
def test_kernels_give_the_plain_paths_values_and_log_sums(kernel, window):
    arrays = [jnp.asarray(drawn(seed, 2, 256, heads, 64)) for seed, heads in enumerate((NUM_HEADS, GROUPS, GROUPS))]
    expected = attention.over_own(*arrays, window)
    found = Part(*kernel(*arrays, window))
    np.testing.assert_allclose(found.values, expected.values, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.log_sum, expected.log_sum, rtol=0, atol=1e-5)


def test_rows_that_a_kernel_takes_go_through_it():
    execution = Execution(backend=KernelBackend.pallas_interpreted)
    arrays = [jnp.asarray(drawn(seed, 1, 128, heads, 64)) for seed, heads in enumerate((NUM_HEADS, GROUPS, GROUPS))]
    used = str(jax.make_jaxpr(lambda *given: attention.over_own(*given, execution=execution))(*arrays))
    assert "pallas_call" in used
    shorter = [array[:, :100] for array in arrays]
    assert "pallas_call" not in str(
        jax.make_jaxpr(lambda *given: attention.over_own(*given, execution=execution))(*shorter)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("window", CASES.values(), ids=CASES.keys())
def test_cudnn_gives_the_plain_paths_values_and_log_sums(window):
    arrays = [
        jnp.asarray(drawn(seed, 2, 256, heads, 64), jnp.bfloat16)
        for seed, heads in enumerate((NUM_HEADS, GROUPS, GROUPS))
    ]
    expected = attention.over_own(*arrays, window)
    found = Part(*attention_kernels.on_gpu(*arrays, window))
    np.testing.assert_allclose(found.values, expected.values, rtol=0, atol=2e-2)
    np.testing.assert_allclose(found.log_sum, expected.log_sum, rtol=0, atol=2e-2)


@pytest.mark.parametrize("fitting", [1, 2], ids=["one", "two, with a place to spare"])
def test_many_blocks_a_few_at_a_time_equal_all_at_once(fitting, monkeypatch):
    arrays = [drawn(0, 2, 7, 4, NUM_HEADS, WIDTH), drawn(1, 2, 20, GROUPS, WIDTH), drawn(2, 2, 20, GROUPS, WIDTH)]
    visible = jnp.asarray(np.random.default_rng(3).random((2, 7, 20)) < 0.5)
    own = [drawn(seed, 2, 7, 4, GROUPS, WIDTH) for seed in (4, 5)]
    given = [*map(jnp.asarray, arrays), visible, *map(jnp.asarray, own)]

    def loss(queries):
        return (attention.block_attention(queries, *given[1:]) ** 2).sum()

    at_once = jax.value_and_grad(loss)(given[0])
    monkeypatch.setattr(attention, "MAX_SCORES", 2 * NUM_HEADS * 4 * 20 * fitting)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), jax.value_and_grad(loss)(given[0]), at_once
    )
