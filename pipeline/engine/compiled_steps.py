"""The engine's steps as compiled programs, on one device or on every shard of a mesh, and the first state."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from pipeline.engine import steps
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
    tokens.
    """

    prefill: Step
    plain_step: Step
    deferring_step: Step
    extend_context: Callable[..., EngineState]
    dflash_round: Callable[[int], Step]
    forced_round: Step
    set_history: Callable[..., EngineState]


@functools.cache  # engines of equal models share their programs
def compile_single(execution: Execution, *, samples: bool) -> CompiledSteps:
    """Returns the steps for the device that holds the weights."""

    def compiled(step: Callable[..., Any], state: int, **options: Any) -> Callable[..., Any]:
        step = functools.partial(step, execution=execution, **options)
        return placement.jit_sharded(step, None, None, None, donated=(state,))

    return CompiledSteps(
        prefill=compiled(steps.prefill, 2, samples=samples),
        plain_step=compiled(steps.plain_step, 1, samples=samples),
        deferring_step=compiled(steps.deferring_step, 2, samples=samples),
        extend_context=compiled(steps.extend_context, 1),
        dflash_round=functools.cache(lambda size: compiled(steps.dflash_round, 2, block_size=size, samples=samples)),
        forced_round=compiled(steps.dflash_round, 2, samples=False),
        set_history=placement.jit_sharded(steps.set_history, None, None, None, donated=(0,)),
    )


def compile_mesh(
    target: TargetModel,
    draft: DraftModel | None,
    state: EngineState,
    runtime: Runtime,
    *,
    samples: bool,
) -> CompiledSteps:
    """Returns the steps for all shards of the runtime's mesh; of models and state only the shapes matter."""
    targets = placement.target_specs(target)
    drafts = None if draft is None else placement.draft_specs(draft)
    states, rows, replicated = state_specs(state), placement.ROWS, placement.REPLICATED
    decoding = (targets, drafts, states, rows)

    def compiled(step: Callable[..., Any], state: int, in_specs: Any, **options: Any) -> Callable[..., Any]:
        step = functools.partial(step, execution=runtime.execution, **options)
        out_specs = states if step.func is steps.extend_context else (states, replicated)
        return placement.jit_sharded(step, runtime.mesh, in_specs, out_specs, donated=(state,))

    return CompiledSteps(
        prefill=compiled(steps.prefill, 2, (targets, drafts, states, rows), samples=samples),
        plain_step=compiled(steps.plain_step, 1, (targets, states, rows), samples=samples),
        deferring_step=compiled(steps.deferring_step, 2, decoding, samples=samples),
        extend_context=compiled(steps.extend_context, 1, (drafts, states, rows)),
        dflash_round=functools.cache(
            lambda size: compiled(steps.dflash_round, 2, decoding, block_size=size, samples=samples)
        ),
        forced_round=compiled(steps.dflash_round, 2, (*decoding, rows), samples=False),
        set_history=placement.jit_sharded(
            steps.set_history, runtime.mesh, (states, rows, VOCABULARY, VOCABULARY), states, donated=(0,)
        ),
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
