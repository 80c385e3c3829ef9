"""The engine's steps as compiled programs, on one device or on every shard of a mesh, and the first state."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pipeline.engine import step_rows, steps
from pipeline.engine.config import EngineConfig
from pipeline.engine.state import EngineState, StepOutput, empty_state
from pipeline.model import placement
from pipeline.model.dflash.model import DraftModel
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.layers.token_rules import TokenHistory
from pipeline.model.parallel.execution import Execution
from pipeline.model.parallel.runtime import Runtime
from pipeline.model.parallel.shards import DATA, MODEL

VOCABULARY: Any = PartitionSpec(DATA, MODEL)  # [B, V]
Step = Callable[..., tuple[EngineState, StepOutput]]


@dataclasses.dataclass(frozen=True)
class CompiledSteps:
    """Holds the functions of `steps` compiled; each of them donates its state.

    `dflash_round` gives the round of a block size; `forced_round` is the one of the draft's own size with forced
    tokens. `draft_apart`, of a block size, and `verify_apart` are a round in two programs; the host sees between them
    what is drafted. Steps that decode take, behind the tables, the slots of their rows, or None for all.
    """

    prefill: Step
    plain_step: Step
    extend_context: Callable[..., EngineState]
    dflash_round: Callable[[int], Step]
    forced_round: Step
    draft_apart: Callable[[int], Callable[..., jax.Array]]
    verify_apart: Step
    set_history: Callable[..., EngineState]
    set_masks: Callable[..., EngineState]


@functools.cache  # engines of equal models share their programs
def compile_single(execution: Execution) -> CompiledSteps:
    """Returns the steps for the device that holds the weights."""
    return _compile(execution, None, None, None, None)


def compile_mesh(target: TargetModel, draft: DraftModel | None, state: EngineState, runtime: Runtime) -> CompiledSteps:
    """Returns the steps for all shards of the runtime's mesh; of models and state only the shapes matter."""
    drafts = None if draft is None else placement.draft_specs(draft)
    return _compile(runtime.execution, runtime.mesh, placement.target_specs(target), drafts, state_specs(state))


def _compile(
    execution: Execution,
    mesh: Mesh | None,
    targets: TargetModel | None,
    drafts: DraftModel | None,
    states: EngineState | None,
) -> CompiledSteps:
    """Returns the steps for the partitions of models and state; without a mesh these have no meaning."""
    rows = placement.ROWS
    decoding, both = (targets, drafts, states, rows, rows), (states, placement.REPLICATED)

    def compiled(step: Callable[..., Any], state: int, in_specs: Any, out_specs: Any = both) -> Callable[..., Any]:
        return placement.jit_sharded(step, mesh, in_specs, out_specs, donated=(state,))

    def with_execution(step: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        return functools.partial(step, execution=execution, **options)

    def decoded(step: Callable[..., Any], *more: Any, **options: Any) -> Step:
        return compiled(step_rows.of_rows(with_execution(step, **options)), 2, (*decoding, *more))

    return CompiledSteps(
        prefill=compiled(with_execution(steps.prefill), 2, (targets, drafts, states, rows)),
        plain_step=decoded(steps.plain_step),
        extend_context=compiled(
            step_rows.extend_rows(with_execution(steps.extend_context)), 1, (drafts, states, rows, rows), states
        ),
        dflash_round=functools.cache(lambda size: decoded(steps.dflash_round, block_size=size)),
        forced_round=decoded(steps.dflash_round, rows),
        draft_apart=functools.cache(
            lambda size: placement.jit_sharded(
                step_rows.read_rows(with_execution(steps.draft_apart, block_size=size)),
                mesh,
                decoding,
                placement.REPLICATED,
            )
        ),
        verify_apart=decoded(steps.verify_apart, rows),
        set_masks=compiled(steps.set_masks, 0, (states, rows, rows), states),
        set_history=compiled(steps.set_history, 0, (states, rows, VOCABULARY, VOCABULARY), states),
    )


def state_specs(state: EngineState) -> EngineState:
    """Returns the partition of every array of a state (or of its shapes)."""
    specs = jax.tree.map(lambda leaf: placement.CACHE if leaf.ndim == 4 else placement.ROWS, state)
    return specs if state.history is None else dataclasses.replace(specs, history=TokenHistory(VOCABULARY, VOCABULARY))


def allocate_state(
    target: TargetModel, draft: DraftModel | None, config: EngineConfig, runtime: Runtime
) -> EngineState:
    """Returns the empty state, every part of it on the shard that will hold it, or on the device of the weights.

    If JAX placed it, its sharding would differ from that of a step's result, and programs would compile twice.
    """

    def build() -> EngineState:
        return empty_state(target, draft, config, runtime.execution.shards.data)

    mesh = runtime.mesh
    if mesh is None:
        return jax.jit(build, out_shardings=target.weights.embedding.sharding)()
    specs = state_specs(jax.eval_shape(build))
    return jax.jit(build, out_shardings=jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))()
