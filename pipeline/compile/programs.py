"""Lowers the engine's steps and the feature pass for a slice, from shapes alone; nothing is ever allocated."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pipeline.engine import capture, compiled_steps
from pipeline.engine.config import EngineConfig
from pipeline.engine.layout import PageLayout, rows_of_shard
from pipeline.engine.state import EngineState, PrefillChunk, block_sizes_of, empty_state, layout_of
from pipeline.model import placement
from pipeline.model.dflash.config import DFlashConfig
from pipeline.model.dflash.model import DraftModel
from pipeline.model.gpt_oss.config import GptOssConfig
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.gpt_oss.weights import WeightFormat
from pipeline.model.layers.kv_pages import PageTables
from pipeline.model.layers.token_rules import greedy_rules
from pipeline.model.parallel.runtime import Runtime

PREFILL, DECODE, DEFERRING, CONTEXT, DRAFT = "prefill", "decode", "decode beside a draft", "context", "draft"
DTYPE = "bfloat16"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServingSizes:
    """Holds the sizes of an engine."""

    model: GptOssConfig
    weight_format: WeightFormat
    engine: EngineConfig
    runtime: Runtime


def lower_serving_steps(
    sizes: ServingSizes, draft: DFlashConfig, block_sizes: list[int]
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yields each step's name and the function that lowers it.

    They are prefill, plain decode without a draft, and a round for each block size; where block sizes adapt, also plain
    decode beside a draft, and what gives the draft the features of that; where requests may have grammars, a round in
    two parts.
    """
    target = _target(sizes)
    chunk, whole, tables = _chunk(sizes), _draft(sizes, draft), _tables(sizes, sizes.engine.num_slots)
    yield PREFILL, lambda: _compiled(sizes, whole).prefill.lower(target, whole, _state(sizes, whole), chunk)
    yield DECODE, lambda: _compiled(sizes, None).plain_step.lower(target, None, _state(sizes, None), tables, None)
    if 1 in block_sizes_of(whole, sizes.engine):
        yield (
            DEFERRING,
            lambda: _compiled(sizes, whole).plain_step.lower(target, whole, _state(sizes, whole), tables, None),
        )
        yield CONTEXT, lambda: _compiled(sizes, whole).extend_context.lower(whole, _state(sizes, whole), tables, None)
    for size in block_sizes:
        drafted = _draft(sizes, dataclasses.replace(draft, block_size=size))
        yield f"dflash {size}", functools.partial(_lower_round, sizes, target, drafted)
    if sizes.engine.samples:  # a round under a grammar
        largest = max(block_sizes_of(whole, sizes.engine))
        drafted = _draft(sizes, dataclasses.replace(draft, block_size=largest))
        yield f"{DRAFT} {largest}", functools.partial(_lower_draft_apart, sizes, target, drafted)
        yield f"verify {largest}", functools.partial(_lower_verify_apart, sizes, target, drafted)


def _lower_round(sizes: ServingSizes, target: TargetModel, draft: DraftModel) -> Any:
    return (
        _compiled(sizes, draft)
        .dflash_round(draft.config.block_size)
        .lower(target, draft, _state(sizes, draft), _tables(sizes, sizes.engine.num_slots), None)
    )


def _lower_draft_apart(sizes: ServingSizes, target: TargetModel, draft: DraftModel) -> Any:
    tables = _tables(sizes, sizes.engine.num_slots)
    return (
        _compiled(sizes, draft)
        .draft_apart(draft.config.block_size)
        .lower(target, draft, _state(sizes, draft), tables, None)
    )


def _lower_verify_apart(sizes: ServingSizes, target: TargetModel, draft: DraftModel) -> Any:
    slots = sizes.engine.num_slots
    drafted = _array(_mesh(sizes), (slots, draft.config.block_size - 1), jnp.int32, placement.ROWS)
    state, tables = _state(sizes, draft), _tables(sizes, slots)
    return _compiled(sizes, draft).verify_apart.lower(target, draft, state, tables, None, drafted)


def lower_feature_pass(sizes: ServingSizes, draft: DFlashConfig, *, num_rows: int, num_positions: int) -> Any:
    """Returns the lowered pass of the frozen target that a live training takes its features from."""
    target = _target(sizes)
    program: Any = capture.feature_program(target, draft.tapped_layers, runtime=sizes.runtime)
    return program.lower(target, _array(_mesh(sizes), (num_rows, num_positions), jnp.int32, placement.ROWS))


def page_layout_of(sizes: ServingSizes, draft: DraftModel | None) -> PageLayout:
    """Returns the pages of each shard of an engine of these sizes."""
    return layout_of(_target(sizes), draft, sizes.engine, sizes.runtime.execution.shards.data)


def _mesh(sizes: ServingSizes) -> Mesh:
    assert sizes.runtime.mesh is not None, "a slice is a mesh"
    return sizes.runtime.mesh


def _compiled(sizes: ServingSizes, draft: DraftModel | None) -> Any:
    """Returns `CompiledSteps`, as Any: their type does not show that they are jitted and can be lowered."""
    return compiled_steps.compile_mesh(
        _target(sizes),
        draft,
        _empty(sizes, draft),
        sizes.runtime,
    )


def _empty(sizes: ServingSizes, draft: DraftModel | None) -> EngineState:
    shards = sizes.runtime.execution.shards.data
    return jax.eval_shape(lambda: empty_state(_target(sizes), draft, sizes.engine, shards))


def _target(sizes: ServingSizes) -> TargetModel:
    shapes = placement.target_shapes(sizes.model, sizes.weight_format)
    return _sharded(shapes, placement.target_shardings(sizes.model, sizes.weight_format, _mesh(sizes)))


def _draft(sizes: ServingSizes, draft: DFlashConfig) -> DraftModel:
    return _sharded(placement.draft_shapes(draft, DTYPE), placement.draft_shardings(draft, DTYPE, _mesh(sizes)))


def _state(sizes: ServingSizes, draft: DraftModel | None) -> EngineState:
    shapes = _empty(sizes, draft)
    specs = compiled_steps.state_specs(shapes)
    return _sharded(shapes, jax.tree.map(lambda spec: NamedSharding(_mesh(sizes), spec), specs))


def _chunk(sizes: ServingSizes) -> PrefillChunk:
    num_shards = sizes.runtime.execution.shards.data
    rows = num_shards * rows_of_shard(sizes.engine.num_slots // num_shards, sizes.engine)
    shapes = dict.fromkeys(("token_ids", "following"), (rows, sizes.engine.prefill_chunk))
    kinds = dict.fromkeys(("is_last", "scored"), jnp.bool_)
    fields = [field.name for field in dataclasses.fields(PrefillChunk) if field.name not in ("rules", "tables")]
    arrays: dict[str, Any] = {
        name: _array(_mesh(sizes), shapes.get(name, (rows,)), kinds.get(name, jnp.int32), placement.ROWS)
        for name in fields
    }
    shapes_of_rules = jax.eval_shape(lambda: greedy_rules(rows))
    rules = jax.tree.map(lambda leaf: _array(_mesh(sizes), leaf.shape, leaf.dtype, placement.ROWS), shapes_of_rules)
    return PrefillChunk(**arrays, tables=_tables(sizes, rows), rules=rules)


def _tables(sizes: ServingSizes, num_rows: int) -> PageTables:
    table: Any = _array(_mesh(sizes), (num_rows, page_layout_of(sizes, None).pages_of_row), jnp.int32, placement.ROWS)
    return PageTables(table, table)


def _sharded(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )


def _array(mesh: Mesh, shape: tuple[int, ...], dtype: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
