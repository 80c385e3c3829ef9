"""The target over finished texts: which experts each layer chooses for each token."""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from pipeline.engine.capture import BATCH_SEQUENCES, batches
from pipeline.model import placement
from pipeline.model.gpt_oss import forward as gpt_oss
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.parallel.execution import Execution
from pipeline.model.parallel.runtime import SINGLE_DEVICE, Runtime


def expert_choices(
    target: TargetModel, texts: Sequence[Sequence[int]], *, runtime: Runtime = SINGLE_DEVICE
) -> Iterator[tuple[int, Int[np.ndarray, "T L k"]]]:
    """Runs texts through the target; yields the index of each text, and the k experts of each token in each layer.

    With a mesh, weights must be sharded as `placement.target_shardings` says.
    """
    specs = None if runtime.mesh is None else placement.target_specs(target)
    program = _program(runtime, specs)
    for indices, length in batches([len(text) for text in texts]):
        token_ids = np.zeros((BATCH_SEQUENCES, length), np.int32)
        for row, index in enumerate(indices):
            token_ids[row, : len(texts[index])] = texts[index]
        found = np.asarray(program(target, token_ids))
        for row, index in enumerate(indices):
            yield index, found[row, : len(texts[index])]


@functools.cache
def _program(
    runtime: Runtime, specs: TargetModel | None
) -> Callable[[TargetModel, Int[np.ndarray, "B T"]], Int[Array, "B T L k"]]:
    step = functools.partial(_choices, execution=runtime.execution)
    return placement.jit_sharded(step, runtime.mesh, (specs, placement.ROWS), placement.ROWS)


def _choices(target: TargetModel, token_ids: Int[Array, "B T"], *, execution: Execution) -> Int[Array, "B T L k"]:
    return gpt_oss.chosen_experts(target, token_ids, execution=execution).astype(jnp.int16)
