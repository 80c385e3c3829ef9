"""Train sequences read again by the live target: are their tokens, labels and features still what it gives?"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int, UInt8

from pipeline.engine.capture import Captured, disagreements
from pipeline.errors import PipelineError
from pipeline.store.feature_codec import relative_errors
from pipeline.store.layout import CachedSequence
from pipeline.store.reader import CacheSplit
from pipeline.teacher_cache.check import FEATURE_OUTLIERS, FEATURE_TOLERANCE, READ_SEQUENCES, Recapture

TOKEN_OUTLIERS = 0.05  # generated tokens that a bfloat16 target may choose otherwise when it reads the whole text
SHOWN = 5

Spoken = Callable[[Int[np.ndarray, " T"], int], UInt8[np.ndarray, " T"]]


@dataclasses.dataclass(frozen=True)
class CacheVerification:
    """How many sequences and tokens were read again, and the largest relative difference of a token's features."""

    num_sequences: int
    num_tokens: int
    worst_difference: float


@dataclasses.dataclass
class _Found:
    """What a sequence differs in: its place, its tokens, those with other features and those with other choices."""

    where: str
    num_tokens: int
    worst: float
    num_off: int
    num_other: int
    problem: str | None


def sample_indices(num_sequences: int, share: float, seed: int) -> list[int]:
    """Which sequences are read again: a share of them, at least one, the same for the same seed."""
    count = min(num_sequences, math.ceil(share * num_sequences))
    return sorted(np.random.default_rng([seed, num_sequences]).permutation(num_sequences)[:count].tolist())


def verify_cache(
    split: CacheSplit,
    chosen: Sequence[int],
    prompts: Sequence[Sequence[int]],
    recapture: Recapture,
    spoken: Spoken,
    *,
    tie_gap: float | None,
    is_exact: bool,
) -> CacheVerification:
    """Reads the `chosen` sequences again; `prompts` are all rendered prompts of the split, `spoken` gives channels.

    A generated token whose logit lies more than `tie_gap` below the best is not the target's own (None: an endpoint's
    text, judged as a whole when it was stored). Unless `is_exact` (float32) a few tokens may differ, as `check`
    lets them. Raises PipelineError naming shard and row of what differs.
    """
    found = []
    for at in range(0, len(chosen), READ_SEQUENCES):
        some = chosen[at : at + READ_SEQUENCES]
        sequences = split.read(some)
        texts, names = [sequence.token_ids.tolist() for sequence in sequences], [split.prompt_ids[i] for i in some]
        for row, captured in recapture(texts, names):
            index, sequence = some[row], sequences[row]
            problem = _problem(sequence, prompts[index], spoken)
            found.append(_compared(split.where(index), sequence, captured, split.layout.num_tapped, tie_gap, problem))
    _judge(found, is_exact)
    num_tokens = sum(one.num_tokens for one in found)
    return CacheVerification(len(found), num_tokens, max((one.worst for one in found), default=0.0))


def _problem(sequence: CachedSequence, prompt: Sequence[int], spoken: Spoken) -> str | None:
    if sequence.token_ids[: sequence.prompt_tokens].tolist() != list(prompt):
        return "does not begin with its prompt"
    if not np.array_equal(sequence.channels, spoken(sequence.token_ids, sequence.prompt_tokens)):
        return "has other channels than its control tokens say"
    return None


def _compared(
    where: str,
    sequence: CachedSequence,
    captured: Captured,
    num_tapped: int,
    tie_gap: float | None,
    problem: str | None,
) -> _Found:
    worst, num_off = 0.0, 0
    if sequence.features is not None:
        errors = relative_errors(sequence.features, captured.features, num_tapped).max(axis=1)
        worst, num_off = float(errors.max()), int((~(errors <= FEATURE_TOLERANCE)).sum())
    other = [] if tie_gap is None else disagreements(captured, sequence.token_ids.tolist(), sequence.prompt_tokens)
    num_other = sum(one.gap > tie_gap for one in other)
    return _Found(where, len(sequence.token_ids), worst, num_off, num_other, problem)


def _judge(found: Sequence[_Found], is_exact: bool) -> None:
    num_tokens = sum(one.num_tokens for one in found)
    features_fail = sum(one.num_off for one in found) > (0 if is_exact else FEATURE_OUTLIERS * num_tokens)
    tokens_fail = sum(one.num_other for one in found) > (0 if is_exact else TOKEN_OUTLIERS * num_tokens)
    problems = []
    for one in sorted(found, key=lambda one: (one.num_off + one.num_other, one.worst), reverse=True):
        if one.problem is not None:
            problems.append(f"{one.where} {one.problem}")
        if one.num_off and features_fail:
            problems.append(
                f"{one.where}: the features of {one.num_off} of {one.num_tokens} tokens are not the target's "
                f"(the worst is off by {one.worst:.1%})"
            )
        if one.num_other and tokens_fail:
            problems.append(f"{one.where}: {one.num_other} tokens are not those that the target chooses")
    if problems:
        listed = "\n  ".join(problems[:SHOWN])
        raise PipelineError(
            f"the live target does not give what the teacher cache holds ({len(problems)} findings in {len(found)} "
            f"sequences read again); use the target it was made with, or delete the cache and make it again\n  {listed}"
        )
