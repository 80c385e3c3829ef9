"""The runtime's steps as compiled programs, on one device or on every shard of a mesh."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from pipeline.model import placement
from pipeline.model.draft import DraftConfig, DraftWeights
from pipeline.model.execution import Execution
from pipeline.model.gpt_oss_config import GptOssConfig
from pipeline.model.gpt_oss_weights import GptOssWeights
from pipeline.model.sampling import Sampling
from pipeline.serve import programs
from pipeline.serve.programs import Chunk, State, Yield


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Jitted `programs.prefill`, `plain_step` and `dflash_round`; they donate the state they are given.

    `replay_round` is `dflash_round` with an answer.
    """

    prefill: Callable[..., tuple[State, Yield]]
    plain_step: Callable[..., tuple[State, Yield]]
    dflash_round: Callable[..., tuple[State, Yield]]
    replay_round: Callable[..., tuple[State, Yield]]


@functools.cache  # engines of equal models share what was compiled
def on_one_device(
    config: GptOssConfig, draft_config: DraftConfig | None, run: Execution, how: Sampling | None = None
) -> Compiled:
    """The programs on the device that holds the weights; with `how`, prefill and the plain step sample."""
    steps = _steps(config, draft_config, run, how)
    return Compiled(*(placement.on_devices(step, None, None, None, donated=(place,)) for step, place in steps))


def on_mesh(
    config: GptOssConfig,
    draft_config: DraftConfig | None,
    run: Execution,
    mesh: Mesh,
    weights: GptOssWeights,
    draft_weights: DraftWeights | None,
    state: State,
    how: Sampling | None = None,
) -> Compiled:
    """As `on_one_device`, on all shards of a mesh; of weights and state only the shapes matter."""
    target = placement.target_specs(weights)
    draft = None if draft_weights is None else placement.draft_specs(draft_weights)
    states, rows, everywhere = state_specs(state), placement.ROWS, placement.EVERYWHERE
    chunk = Chunk(*[rows] * len(dataclasses.fields(Chunk)))
    if how is None:
        chunk = dataclasses.replace(chunk, keys=None)
    given = [
        (target, draft, states, chunk, everywhere),
        (target, states, everywhere),
        (target, draft, states, everywhere),
        (target, draft, states, everywhere, rows),
    ]
    steps = zip(_steps(config, draft_config, run, how), given, strict=True)
    told = (states, everywhere)
    return Compiled(
        *(placement.on_devices(step, mesh, specs, told, donated=(place,)) for (step, place), specs in steps)
    )


def state_specs(state: State) -> State:
    """The partition of every array of a state (or of its shapes)."""
    return jax.tree.map(lambda leaf: placement.CACHE if leaf.ndim == 4 else placement.ROWS, state)


def new_state(make: Callable[[], State], mesh: Mesh | None, weights: GptOssWeights) -> State:
    """What `make` makes, every part of it on the shard (or beside the weights) that will hold it, from the beginning.

    Left to JAX to place, it would look another way than what a step returns, and a program would compile twice.
    """
    if mesh is None:
        return jax.jit(make, out_shardings=weights.embedding.sharding)()
    specs = state_specs(jax.eval_shape(make))
    return jax.jit(make, out_shardings=jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))()


def _steps(
    config: GptOssConfig, draft_config: DraftConfig | None, run: Execution, how: Sampling | None
) -> list[tuple[Callable[..., Any], int]]:
    """Each step with the place of its state among its arguments."""
    both = functools.partial(programs.prefill, config=config, draft_config=draft_config, run=run, how=how)
    plain = functools.partial(programs.plain_step, config=config, run=run, how=how)
    drafted = functools.partial(programs.dflash_round, config=config, draft_config=draft_config, run=run)
    return [(both, 2), (plain, 1), (drafted, 2), (drafted, 2)]
