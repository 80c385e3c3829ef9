"""The programs of the runtime for a slice, by the shapes of what they are given: nothing is ever allocated."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pipeline.model import draft as draft_model
from pipeline.model import gpt_oss_weights, placement
from pipeline.model.draft import DraftConfig
from pipeline.model.execution import Execution
from pipeline.model.gpt_oss_config import GptOssConfig
from pipeline.model.gpt_oss_weights import WeightsForm
from pipeline.serve import compiled, programs
from pipeline.serve.engine import num_positions, rows_of_shard
from pipeline.serve.programs import Chunk
from pipeline.teacher_cache import capture

PREFILL, DECODE = "prefill", "decode"
NUM_STOPS = 3  # return, call and endoftext
DTYPE = "bfloat16"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serving:
    """What an engine is made with, its sizes alone."""

    model: GptOssConfig
    form: WeightsForm
    run: Execution
    mesh: Mesh
    slots: int
    max_length: int
    prefill_chunk: int


def lowered(sizes: Serving, draft: DraftConfig, block_sizes: list[int]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Each program's name and the function that traces it: prefill, plain decode, and a round for each block size."""
    weights = _placed_target(sizes)
    stops = _array(sizes.mesh, (NUM_STOPS,), jnp.int32, placement.EVERYWHERE)
    state = _state(sizes, draft)
    steps = _compiled(sizes, draft)
    drafted = _placed_draft(sizes, draft)
    yield PREFILL, lambda: steps.prefill.lower(weights, drafted, state, _chunk(sizes), stops)
    yield DECODE, lambda: _compiled(sizes, None).plain_step.lower(weights, _state(sizes, None), stops)
    for size in block_sizes:
        block = dataclasses.replace(draft, block_size=size)
        yield (
            f"dflash {size}",
            lambda block=block: _compiled(sizes, block).dflash_round.lower(
                weights, drafted, _state(sizes, block), stops
            ),
        )


def lowered_features(sizes: Serving, draft: DraftConfig, *, num_rows: int, num_positions: int) -> Any:
    """The traced pass of the frozen target that a live training takes its features from."""
    weights = _placed_target(sizes)
    program = capture.feature_program(weights, sizes.model, draft.tapped_layers, run=sizes.run, mesh=sizes.mesh)
    return program.lower(weights, _array(sizes.mesh, (num_rows, num_positions), jnp.int32, placement.ROWS))


def _compiled(sizes: Serving, draft: DraftConfig | None) -> compiled.Compiled:
    state = jax.eval_shape(lambda: _empty(sizes, draft))
    drafted = None if draft is None else _draft_shapes(draft)
    return compiled.on_mesh(sizes.model, draft, sizes.run, sizes.mesh, _target_shapes(sizes), drafted, state)


def _empty(sizes: Serving, draft: DraftConfig | None) -> programs.State:
    block = 1 if draft is None else draft.block_size
    positions = num_positions(sizes.max_length, sizes.prefill_chunk, block)
    return programs.empty_state(sizes.model, draft, sizes.slots, positions, DTYPE)


def _target_shapes(sizes: Serving) -> Any:
    return gpt_oss_weights.weight_shapes(sizes.model, sizes.form)


def _draft_shapes(draft: DraftConfig) -> Any:
    return draft_model.weight_shapes(draft, DTYPE)


def _placed_target(sizes: Serving) -> Any:
    return _placed(_target_shapes(sizes), placement.target_places(sizes.model, sizes.form, sizes.mesh))


def _placed_draft(sizes: Serving, draft: DraftConfig) -> Any:
    return _placed(_draft_shapes(draft), placement.draft_places(draft, DTYPE, sizes.mesh))


def _state(sizes: Serving, draft: DraftConfig | None) -> Any:
    shapes = jax.eval_shape(lambda: _empty(sizes, draft))
    specs = compiled.state_specs(shapes)
    return _placed(shapes, jax.tree.map(lambda spec: NamedSharding(sizes.mesh, spec), specs))


def _chunk(sizes: Serving) -> Chunk:
    places = sizes.run.shards.data * rows_of_shard(sizes.slots // sizes.run.shards.data)
    shapes = {"token_ids": (places, sizes.prefill_chunk)}
    kinds = {"is_last": jnp.bool_}
    fields = [field.name for field in dataclasses.fields(Chunk) if field.name != "keys"]  # serving is greedy
    return Chunk(
        **{
            name: _array(sizes.mesh, shapes.get(name, (places,)), kinds.get(name, jnp.int32), placement.ROWS)
            for name in fields
        }
    )


def _placed(shapes: Any, places: Any) -> Any:
    return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), shapes, places)


def _array(mesh: Mesh, shape: tuple[int, ...], dtype: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
