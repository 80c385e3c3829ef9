"""Whether DFLASH gave plain greedy's tokens, and where not, whether that is a tie or a bug.

Verifying a block rounds differently from decoding one token, so two logits that are equal within rounding
can change places. The gap between the two best logits at the first difference tells such a tie from a bug.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pipeline.model import gpt_oss
from pipeline.model.gpt_oss_config import GptOssConfig
from pipeline.model.gpt_oss_weights import GptOssWeights
from pipeline.serve.engine import Finished
from pipeline.serve.scheduler import Request

TIE_GAP = {"float32": 1e-3, "bfloat16": 0.25}  # logits; bfloat16 keeps 8 bits of values around 10 to 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """The first place where the two arms disagree on a request, and how close the target's choice was there."""

    request_id: str
    position: int
    plain_token: int | None
    dflash_token: int | None
    logit_gap: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Losslessness:
    """How many answers are equal token by token, and every difference."""

    num_answers: int
    differences: tuple[Difference, ...]
    tie_gap: float

    @property
    def num_equal(self) -> int:
        """Answers equal to the last token."""
        return self.num_answers - len(self.differences)

    @property
    def bugs(self) -> tuple[Difference, ...]:
        """Differences that no rounding explains."""
        return tuple(one for one in self.differences if one.logit_gap > self.tie_gap)


def compare(
    plain: Mapping[str, Finished],
    dflash: Mapping[str, Finished],
    requests: Sequence[Request],
    weights: GptOssWeights,
    config: GptOssConfig,
) -> Losslessness:
    """Compare the answers of two passes over the same requests."""
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
                logit_gap=logit_gap(weights, config, [*request.prompt_ids, *slow[:at]]),
            )
        )
    tie_gap = TIE_GAP[jnp.dtype(weights.embedding.dtype).name]
    return Losslessness(num_answers=len(requests), differences=tuple(differences), tie_gap=tie_gap)


def logit_gap(weights: GptOssWeights, config: GptOssConfig, token_ids: Sequence[int]) -> float:
    """Best minus second-best logit of the token that follows `token_ids`."""
    padded = -len(token_ids) % 64 + len(token_ids)  # few shapes to compile
    row = jnp.zeros((1, padded), jnp.int32).at[0, : len(token_ids)].set(jnp.asarray(token_ids))
    return float(_gap_at(weights, row, jnp.asarray(len(token_ids) - 1), config=config))


@partial(jax.jit, static_argnames="config")
def _gap_at(
    weights: GptOssWeights, row: Int[Array, "1 T"], at: Int[Array, ""], *, config: GptOssConfig
) -> Float[Array, ""]:
    hidden = gpt_oss.forward(weights, config, row, jnp.zeros(1, jnp.int32), None).hidden
    best, _ = jax.lax.top_k(gpt_oss.logits(weights, hidden[0, at]), 2)
    return best[0] - best[1]
