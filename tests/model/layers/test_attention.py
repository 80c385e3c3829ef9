"""Attention in parts against one softmax in NumPy, and kernels against the parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipeline.model.layers import attention, attention_kernels, kv_cache
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


@pytest.mark.parametrize("window", [None, 5], ids=["full", "sliding"])
@pytest.mark.parametrize("rows", [None, [3, 0, 9]], ids=["rows in order", "rows by number"])
def test_cache_and_own_tokens_and_sinks_are_one_softmax(window, rows):
    start, width, num_entries = np.array([0, 4, 13]), 3, 9 if window else 32
    keys, values, sinks = drawn(0, 3, 16, GROUPS, WIDTH), drawn(1, 3, 16, GROUPS, WIDTH), drawn(2, NUM_HEADS)
    queries = drawn(3, 3, width, NUM_HEADS, WIDTH)
    in_cache = [0, 1, 2] if rows is None else [3, 0, 1]  # 9 is past the last of four rows
    entries = np.full((4, num_entries, GROUPS, WIDTH), 7.0, np.float32)
    cached = [entries.copy(), entries.copy()]
    for row in range(3):
        for position in range(start[row]):
            for held, source in zip(cached, (keys, values), strict=True):
                held[in_cache[row], position % num_entries] = source[row, position]
    cache = kv_cache.LayerCache(*(jnp.asarray(held if rows else held[:3]) for held in cached))
    numbers = None if rows is None else jnp.asarray(rows)
    own = [np.stack([source[row, at : at + width] for row, at in enumerate(start)]) for source in (keys, values)]
    parts = [
        attention.over_own(jnp.asarray(queries), *map(jnp.asarray, own), window),
        attention.over_cache(jnp.asarray(queries), cache, jnp.asarray(start), numbers, window),
    ]
    found = attention.union(parts, jnp.asarray(sinks))
    positions = start[:, None] + np.arange(width)
    seen_to = [np.where(np.arange(16) < start[row] + width, np.arange(16), -1) for row in range(3)]
    expected = whole(queries, keys, values, positions, seen_to, window, sinks)
    checked = slice(0, 2 if rows else 3)  # the row past the last has no cache to read
    np.testing.assert_allclose(found[checked], expected[checked], rtol=0, atol=1e-5)


def test_a_long_cache_is_read_in_chunks_to_the_same_result(monkeypatch):
    queries, start = drawn(0, 3, 2, NUM_HEADS, WIDTH), jnp.asarray([0, 100, 1000])
    cache = kv_cache.LayerCache(*(jnp.asarray(drawn(seed, 3, 1024, GROUPS, WIDTH)) for seed in (1, 2)))
    at_once = attention.over_cache(jnp.asarray(queries), cache, start, None, None)
    monkeypatch.setattr(attention, "CACHE_CHUNK", 128)
    in_chunks = attention.over_cache(jnp.asarray(queries), cache, start, None, None)
    np.testing.assert_allclose(in_chunks.values[1:], at_once.values[1:], rtol=0, atol=1e-5)
    np.testing.assert_allclose(in_chunks.log_sum[1:], at_once.log_sum[1:], rtol=0, atol=1e-5)
    assert (in_chunks.log_sum[0] < -1e29).all()  # nothing is cached of this row
    assert (at_once.log_sum[0] < -1e29).all()


def test_a_chunk_past_the_longest_row_is_not_read(monkeypatch):
    monkeypatch.setattr(attention, "CACHE_CHUNK", 128)
    queries, start = jnp.asarray(drawn(0, 2, 1, NUM_HEADS, WIDTH)), jnp.asarray([5, 200])
    keys, values = (drawn(seed, 2, 512, GROUPS, WIDTH) for seed in (1, 2))
    values[:, 256:] = np.nan  # 0 x nan would show
    found = attention.over_cache(
        queries, kv_cache.LayerCache(jnp.asarray(keys), jnp.asarray(values)), start, None, None
    )
    assert np.isfinite(found.values).all()


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
