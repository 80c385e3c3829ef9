"""Checks whether DFLASH gave plain greedy's tokens, and whether a difference is a tie or a bug.

Verifying a block rounds differently from decoding one token, so two logits that are equal within rounding
can change places. The gap between the two best logits at the first difference tells such a tie from a bug; of drawn
tokens the noise is added to the logits first.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from pipeline.engine.request import Completion, Request
from pipeline.engine.sampling_params import GREEDY, SamplingParams
from pipeline.engine.ties import TIE_GAP
from pipeline.model import placement
from pipeline.model.gpt_oss import forward as gpt_oss
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.layers import sampling as sampling_layer
from pipeline.model.parallel.execution import Execution
from pipeline.model.parallel.runtime import SINGLE_DEVICE, Runtime


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """Holds the first position at which the arms disagree on a request, and how close the target's choice was."""

    request_id: str
    position: int
    plain_token: int | None
    dflash_token: int | None
    logit_gap: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Losslessness:
    """Holds the number of answers, and every difference between the two arms' answers."""

    num_answers: int
    differences: tuple[Difference, ...]
    tie_gap: float

    @property
    def num_equal(self) -> int:
        """Returns the number of answers that are equal to the last token."""
        return self.num_answers - len(self.differences)

    @property
    def bugs(self) -> tuple[Difference, ...]:
        """Returns the differences that no rounding explains."""
        return tuple(one for one in self.differences if one.logit_gap > self.tie_gap)

    @property
    def ties(self) -> tuple[Difference, ...]:
        """Returns the differences that rounding explains."""
        return tuple(one for one in self.differences if one.logit_gap <= self.tie_gap)


def compare_answers(
    plain: Mapping[str, Completion],
    dflash: Mapping[str, Completion],
    requests: Sequence[Request],
    target: TargetModel,
    runtime: Runtime = SINGLE_DEVICE,
) -> Losslessness:
    """Compares the answers of two passes over the same requests."""
    differences = []
    for request in requests:
        slow, fast = plain[request.request_id].token_ids, dflash[request.request_id].token_ids
        if slow == fast:
            continue
        at = next((i for i, (a, b) in enumerate(zip(slow, fast, strict=False)) if a != b), min(len(slow), len(fast)))
        differences.append(
            Difference(
                request_id=request.request_id,
                position=at,
                plain_token=slow[at] if at < len(slow) else None,
                dflash_token=fast[at] if at < len(fast) else None,
                logit_gap=logit_gap(target, [*request.prompt_ids, *slow[:at]], request.sampling, runtime),
            )
        )
    tie_gap = TIE_GAP[target.weights.embedding.dtype.name]
    return Losslessness(num_answers=len(requests), differences=tuple(differences), tie_gap=tie_gap)


def logit_gap(
    target: TargetModel,
    token_ids: Sequence[int],
    sampling: SamplingParams = GREEDY,
    runtime: Runtime = SINGLE_DEVICE,
) -> float:
    """Returns the best minus the second-best logit of the token that follows `token_ids`, with its noise.

    Of `sampling` the temperature and the key count.
    """
    padded = -len(token_ids) % 64 + len(token_ids)  # so that few shapes are compiled
    row = np.zeros((1, padded), np.int32)
    row[0, : len(token_ids)] = token_ids
    specs = None if runtime.mesh is None else placement.target_specs(target)
    program = _program(runtime, specs, sampling.temperature)
    return float(program(target, row, np.int32(len(token_ids) - 1), np.asarray([sampling.key], np.uint32)))


@functools.cache
def _program(
    runtime: Runtime, specs: TargetModel | None, temperature: float
) -> Callable[[TargetModel, Int[np.ndarray, "1 T"], np.int32, UInt32[np.ndarray, "1 two"]], Float[Array, ""]]:
    step = functools.partial(_gap_at, temperature=temperature, execution=runtime.execution)
    replicated = placement.REPLICATED
    return placement.jit_sharded(step, runtime.mesh, (specs, replicated, replicated, replicated), replicated)


def _gap_at(
    target: TargetModel,
    row: Int[Array, "1 T"],
    at: Int[Array, ""],
    key: UInt32[Array, "1 two"],
    *,
    temperature: float,
    execution: Execution,
) -> Float[Array, ""]:
    hidden = gpt_oss.forward(target, row, jnp.zeros(1, jnp.int32), None, execution=execution).hidden
    logits = gpt_oss.logits(target.weights, hidden[:, at])
    if temperature:
        logits += temperature * sampling_layer.noise(key, at[None] + 1, logits.shape[-1], execution.shards)
    best = execution.shards.largest(logits, 2)[0][0]
    return best[0] - best[1]
