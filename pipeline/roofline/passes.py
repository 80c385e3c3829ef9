"""Times the target's passes, and relates the bytes they must read to the bandwidth that a copy reaches."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int

from pipeline.cost import memory_traffic
from pipeline.cost.machine_speed import median_seconds
from pipeline.model import placement
from pipeline.model.gpt_oss import forward as gpt_oss
from pipeline.model.gpt_oss import weights as gpt_oss_weights
from pipeline.model.gpt_oss.config import GptOssConfig
from pipeline.model.gpt_oss.experts import mixture
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.gpt_oss.weights import WeightFormat
from pipeline.model.layers import kv_pages
from pipeline.model.layers.kv_pages import PagedCache, PageTables
from pipeline.model.parallel.execution import Execution
from pipeline.model.parallel.runtime import Runtime
from pipeline.pages.columns import columns

PAGE_SIZE = 64


@dataclasses.dataclass(frozen=True)
class RooflinePass:
    """A pass to time: `num_rows` rows of `tokens_per_row` tokens each, after `context` cached ones."""

    name: str
    num_rows: int
    tokens_per_row: int
    context: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timed:
    """Holds a pass's median seconds, the bytes it must read, and its share of the bandwidth that a copy reaches."""

    timed: RooflinePass
    seconds: float
    read_bytes: float
    share: float


def random_target(config: GptOssConfig, weight_format: WeightFormat, runtime: Runtime, seed: int) -> TargetModel:
    """Returns random weights of the target's shapes and sharding: a pass takes as long with any values."""

    def make() -> TargetModel:
        return TargetModel(config, gpt_oss_weights.random_weights(config, jax.random.key(seed), weight_format))

    if runtime.mesh is None:
        return jax.jit(make)()
    return jax.jit(make, out_shardings=placement.target_shardings(config, weight_format, runtime.mesh))()


def time_passes(
    target: TargetModel,
    weight_format: WeightFormat,
    runtime: Runtime,
    passes: Sequence[RooflinePass],
    *,
    repeats: int,
    bandwidth: float,
) -> list[Timed]:
    """Times every pass: the median of `repeats` runs, one after the other over the same cache."""
    timed = []
    specs = None if runtime.mesh is None else placement.target_specs(target)
    for one in passes:
        seconds = median_seconds(_runner(target, weight_format, runtime, one, specs), repeats)
        read = memory_traffic.target_bytes(
            target.config, one.num_rows, one.tokens_per_row, one.context, packed=weight_format.packed
        )
        timed.append(Timed(timed=one, seconds=seconds, read_bytes=read, share=read / seconds / bandwidth))
    return timed


def expert_costs(
    config: GptOssConfig,
    weight_format: WeightFormat,
    execution: Execution,
    num_tokens: Sequence[int],
    *,
    repeats: int,
    seed: int,
) -> list[tuple[int, float, float]]:
    """Returns the median seconds of one layer's experts for numbers of tokens: expert by expert, and grouped."""
    one_layer = dataclasses.replace(config, num_hidden_layers=1, sliding=config.sliding[:1], vocab_size=1)
    weights = jax.jit(lambda: gpt_oss_weights.random_weights(one_layer, jax.random.key(seed), weight_format))()
    experts = weights.layers[0].experts
    costs = []
    for count in num_tokens:
        inputs = jax.random.normal(jax.random.key(seed + count), (count, config.hidden_size)).astype(
            weight_format.dtype
        )
        each, grouped = (
            median_seconds(functools.partial(_layer(config, execution, limit), inputs, experts), repeats)
            for limit in (count, 0)
        )
        costs.append((count, each, grouped))
    return costs


def _layer(config: GptOssConfig, execution: Execution, max_per_expert_tokens: int) -> Callable[..., Array]:
    """Returns the jitted layer of experts that computes expert by expert up to a number of tokens."""
    execution = dataclasses.replace(execution, max_per_expert_tokens=max_per_expert_tokens)

    def layer(inputs: Array, experts: Any) -> Array:
        return mixture(inputs, experts, config.num_experts_per_tok, config.swiglu_limit, execution)

    return jax.jit(layer)


def pass_table(timed: Sequence[Timed], bandwidth: float) -> str:
    """Returns a table with a line for each pass."""
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
    return f"{columns([head, *rows])}\na copy reads and writes {bandwidth / 1e9:.1f} GB/s"


def expert_table(costs: Sequence[tuple[int, float, float]]) -> str:
    """Returns a table with a line for each number of tokens."""
    head = ("tokens", "per expert", "grouped")
    return columns([head, *((f"{n}", f"{each * 1e3:.2f} ms", f"{grouped * 1e3:.2f} ms") for n, each, grouped in costs)])


def _runner(
    target: TargetModel,
    weight_format: WeightFormat,
    runtime: Runtime,
    one: RooflinePass,
    specs: Any,
) -> Callable[[], Array]:
    """Returns a function that runs a pass over the same cache each time, and writes it in place."""
    config, execution = target.config, runtime.execution

    def step(
        target: TargetModel, cache: PagedCache, ids: Int[Array, "B T"], start: Int[Array, " B"], tables: PageTables
    ) -> tuple[Int[Array, " B"], PagedCache | None]:
        out = gpt_oss.forward(target, ids, start, cache, tables=tables, execution=execution)
        return gpt_oss.next_tokens(target.weights, out.hidden[:, -1], execution.shards), out.cache

    rows, cached = placement.ROWS, placement.CACHE
    program = placement.jit_sharded(step, runtime.mesh, (specs, cached, rows, rows, rows), (rows, cached), donated=(1,))
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (one.num_rows, one.tokens_per_row), np.int32)
    start = np.full(one.num_rows, one.context, np.int32)
    num_shards = execution.shards.data
    length = one.context + one.tokens_per_row
    of_shard = kv_pages.consecutive_tables(one.num_rows // num_shards, length, PAGE_SIZE)
    tables = jax.tree.map(lambda table: np.tile(table, (num_shards, 1)), of_shard)  # pages are numbered by shard
    num_pages = tables.whole.size + num_shards - 1  # each shard has a spare one
    cache = _cache(config, num_pages, weight_format.dtype, runtime)

    def run() -> Array:
        nonlocal cache
        tokens, cache = program(target, cache, ids, start, tables)
        return tokens

    return run


def _cache(config: GptOssConfig, num_pages: int, dtype: str, runtime: Runtime) -> PagedCache:
    def make() -> PagedCache:
        return gpt_oss.empty_cache(config, num_pages, num_pages, PAGE_SIZE, dtype)

    if runtime.mesh is None:
        return jax.jit(make)()
    return jax.jit(make, out_shardings=jax.sharding.NamedSharding(runtime.mesh, placement.CACHE))()
