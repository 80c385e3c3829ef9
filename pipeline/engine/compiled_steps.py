"""The engine's steps as compiled programs, on one device or on every shard of a mesh, and the first state."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from pipeline.engine import steps
from pipeline.engine.config import EngineConfig
from pipeline.engine.state import EngineState, PrefillChunk, StepOutput, empty_state
from pipeline.model import placement
from pipeline.model.dflash.model import DraftModel
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.layers.sampling import Sampling
from pipeline.model.parallel.execution import Execution
from pipeline.model.parallel.runtime import Runtime


@dataclasses.dataclass(frozen=True)
class CompiledSteps:
    """Holds `steps.prefill`, `plain_step` and `dflash_round` compiled; each of them donates its state.

    `forced_round` is `dflash_round` with forced tokens.
    """

    prefill: Callable[..., tuple[EngineState, StepOutput]]
    plain_step: Callable[..., tuple[EngineState, StepOutput]]
    dflash_round: Callable[..., tuple[EngineState, StepOutput]]
    forced_round: Callable[..., tuple[EngineState, StepOutput]]


@functools.cache  # engines of equal models share their programs
def compile_single(execution: Execution, sampling: Sampling | None = None) -> CompiledSteps:
    """Returns the steps for the device that holds the weights; with `sampling`, prefill and the plain step sample."""
    return CompiledSteps(
        *(
            placement.jit_sharded(step, None, None, None, donated=(state,))
            for step, state in _steps(execution, sampling)
        )
    )


def compile_mesh(
    target: TargetModel,
    draft: DraftModel | None,
    state: EngineState,
    runtime: Runtime,
    sampling: Sampling | None = None,
) -> CompiledSteps:
    """Returns the steps for all shards of the runtime's mesh; of models and state only the shapes matter."""
    targets = placement.target_specs(target)
    drafts = None if draft is None else placement.draft_specs(draft)
    states, rows, replicated = state_specs(state), placement.ROWS, placement.REPLICATED
    chunk = PrefillChunk(*[rows] * len(dataclasses.fields(PrefillChunk)))
    if sampling is None:
        chunk = dataclasses.replace(chunk, keys=None)
    in_specs = [
        (targets, drafts, states, chunk, replicated),
        (targets, states, replicated),
        (targets, drafts, states, replicated),
        (targets, drafts, states, replicated, rows),
    ]
    out_specs = (states, replicated)
    return CompiledSteps(
        *(
            placement.jit_sharded(step, runtime.mesh, specs, out_specs, donated=(index,))
            for (step, index), specs in zip(_steps(runtime.execution, sampling), in_specs, strict=True)
        )
    )


def state_specs(state: EngineState) -> EngineState:
    """Returns the partition of every array of a state (or of its shapes)."""
    return jax.tree.map(lambda leaf: placement.CACHE if leaf.ndim == 4 else placement.ROWS, state)


def allocate_state(
    target: TargetModel, draft: DraftModel | None, config: EngineConfig, mesh: Mesh | None
) -> EngineState:
    """Returns the empty state, every part of it on the shard that will hold it, or on the device of the weights.

    If JAX placed it, its sharding would differ from that of a step's result, and programs would compile twice.
    """

    def build() -> EngineState:
        return empty_state(target, draft, config)

    if mesh is None:
        return jax.jit(build, out_shardings=target.weights.embedding.sharding)()
    specs = state_specs(jax.eval_shape(build))
    return jax.jit(build, out_shardings=jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))()


def _steps(execution: Execution, sampling: Sampling | None) -> list[tuple[Callable[..., Any], int]]:
    """Returns each step with the index of its state among its arguments."""
    prefill = functools.partial(steps.prefill, execution=execution, sampling=sampling)
    plain = functools.partial(steps.plain_step, execution=execution, sampling=sampling)
    drafted = functools.partial(steps.dflash_round, execution=execution)
    return [(prefill, 2), (plain, 1), (drafted, 2), (drafted, 2)]
