"""The target's passes against the memory they must read: milliseconds, bytes, and the share of what a copy reaches."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from pipeline.machine import Machine
from pipeline.model import gpt_oss, gpt_oss_weights, placement, traffic
from pipeline.model.execution import Execution
from pipeline.model.experts import mixture
from pipeline.model.gpt_oss_config import GptOssConfig
from pipeline.model.gpt_oss_weights import GptOssWeights, WeightsForm
from pipeline.model.kv_cache import KVCache

COPY_BYTES = 2**28  # read, and as many written


@dataclasses.dataclass(frozen=True)
class Pass:
    """What is timed: `num_rows` rows of `tokens_per_row` tokens each, behind `context` cached ones."""

    name: str
    num_rows: int
    tokens_per_row: int
    context: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timed:
    """A pass's median seconds, the bytes it must read, and its share of the bandwidth that a copy reaches."""

    timed: Pass
    seconds: float
    read_bytes: float
    share: float


def copy_bandwidth(here: Machine) -> float:
    """Bytes a second, read and written, that all devices reach together when each goes over a large array in place."""
    devices = 1 if here.mesh is None else here.mesh.devices.size
    shape = (devices, COPY_BYTES // 4)
    if here.mesh is None:
        array = jnp.ones(shape, jnp.float32)
    else:
        everywhere = jax.sharding.NamedSharding(here.mesh, jax.sharding.PartitionSpec(here.mesh.axis_names))
        array = jax.jit(lambda: jnp.ones(shape, jnp.float32), out_shardings=everywhere)()
    # in place: on a CPU, memory that is new to the process costs more than writing to it
    over = jax.jit(lambda given: given + 1.0, donate_argnums=0)

    def run() -> Array:
        nonlocal array
        array = over(array)
        return array

    return devices * 2 * COPY_BYTES / _median_seconds(run, 20)


def random_target(config: GptOssConfig, form: WeightsForm, here: Machine, seed: int) -> GptOssWeights:
    """Weights of the target's shapes where they belong: how long a pass takes does not hang on their values."""

    def make() -> GptOssWeights:
        return gpt_oss_weights.random_weights(config, jax.random.key(seed), form)

    if here.mesh is None:
        return jax.jit(make)()
    return jax.jit(make, out_shardings=placement.target_places(config, form, here.mesh))()


def time_passes(
    weights: GptOssWeights,
    config: GptOssConfig,
    form: WeightsForm,
    here: Machine,
    passes: Sequence[Pass],
    *,
    repeats: int,
    bandwidth: float,
) -> list[Timed]:
    """Time every pass: the median of `repeats` runs, one after the other over the same cache."""
    timed = []
    specs = None if here.mesh is None else placement.target_specs(weights)
    for one in passes:
        seconds = _median_seconds(_runner(weights, config, form, here, one, specs), repeats)
        read = traffic.target_bytes(config, one.num_rows, one.tokens_per_row, one.context, packed=form.packed)
        timed.append(Timed(timed=one, seconds=seconds, read_bytes=read, share=read / seconds / bandwidth))
    return timed


def expert_costs(
    config: GptOssConfig, form: WeightsForm, run: Execution, num_tokens: Sequence[int], *, repeats: int, seed: int
) -> list[tuple[int, float, float]]:
    """Median seconds of one layer's experts for numbers of tokens: hit by hit, and grouped."""
    one_layer = dataclasses.replace(config, num_hidden_layers=1, sliding=config.sliding[:1], vocab_size=1)
    weights = jax.jit(lambda: gpt_oss_weights.random_weights(one_layer, jax.random.key(seed), form))()
    experts = weights.layers[0].experts
    costs = []
    for count in num_tokens:
        inputs = jax.random.normal(jax.random.key(seed + count), (count, config.hidden_size)).astype(form.dtype)
        seconds = []
        for few in (count, 0):
            how = dataclasses.replace(run, few_tokens=few)
            layer = jax.jit(lambda x, w, how=how: mixture(x, w, config.num_experts_per_tok, config.swiglu_limit, how))
            seconds.append(_median_seconds(lambda layer=layer, x=inputs: layer(x, experts), repeats))
        costs.append((count, *seconds))
    return costs


def table(timed: Sequence[Timed], bandwidth: float) -> str:
    """One line a pass."""
    head = ("pass", "rows", "tokens", "context", "ms", "reads", "share of copy")
    rows = [
        (
            one.timed.name,
            f"{one.timed.num_rows}",
            f"{one.timed.tokens_per_row}",
            f"{one.timed.context}",
            f"{one.seconds * 1e3:.2f}",
            f"{one.read_bytes / 1e6:.1f} MB",
            f"{one.share:.0%}",
        )
        for one in timed
    ]
    return f"{_columns([head, *rows])}\na copy reads and writes {bandwidth / 1e9:.1f} GB/s"


def expert_table(costs: Sequence[tuple[int, float, float]]) -> str:
    """One line a number of tokens."""
    head = ("tokens", "hit by hit", "grouped")
    return _columns([head, *((f"{n}", f"{few * 1e3:.2f} ms", f"{many * 1e3:.2f} ms") for n, few, many in costs)])


def _columns(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _runner(
    weights: GptOssWeights, config: GptOssConfig, form: WeightsForm, here: Machine, one: Pass, specs: Any
) -> Callable[[], Array]:
    """What runs a pass again and again over the same cache, which it writes where it lies."""

    def step(
        weights: GptOssWeights, cache: KVCache, ids: Int[Array, "B T"], start: Int[Array, " B"]
    ) -> tuple[Int[Array, " B"], KVCache]:
        out = gpt_oss.forward(weights, config, ids, start, cache, run=here.run)
        return gpt_oss.next_tokens(weights, out.hidden[:, -1], here.run.shards), out.cache

    rows, cached = placement.ROWS, placement.CACHE
    program = placement.on_devices(step, here.mesh, (specs, cached, rows, rows), (rows, cached), donated=(1,))
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (one.num_rows, one.tokens_per_row), np.int32)
    start = np.full(one.num_rows, one.context, np.int32)
    cache = _cache(config, one, form.dtype, here)

    def run() -> Array:
        nonlocal cache
        tokens, cache = program(weights, cache, ids, start)
        return tokens

    return run


def _cache(config: GptOssConfig, one: Pass, dtype: str, here: Machine) -> KVCache:
    length = one.context + one.tokens_per_row

    def make() -> KVCache:
        return gpt_oss.empty_cache(config, one.num_rows, length, dtype, rollback=one.tokens_per_row)

    if here.mesh is None:
        return jax.jit(make)()
    place = jax.sharding.NamedSharding(here.mesh, placement.CACHE)
    return jax.jit(make, out_shardings=place)()


def _median_seconds(run: Callable[[], Any], repeats: int) -> float:
    jax.block_until_ready(run())  # compiles
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
