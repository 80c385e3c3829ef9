"""Verifies train sequences: the live target reads them again and must give the same tokens and features."""

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

TOKEN_OUTLIERS = 0.05  # share of generated tokens that a bfloat16 target may choose otherwise in the whole text
SHOWN = 5

FindChannels = Callable[[Int[np.ndarray, " T"], int], UInt8[np.ndarray, " T"]]


@dataclasses.dataclass(frozen=True)
class CacheVerification:
    """Counts the sequences and tokens read again; holds the largest relative difference of a token's features."""

    num_sequences: int
    num_tokens: int
    worst_difference: float


@dataclasses.dataclass
class _Difference:
    """Holds how a sequence differs: `num_off` tokens in their features, `num_other` in the target's choice."""

    where: str
    num_tokens: int
    worst: float
    num_off: int
    num_other: int
    problem: str | None


def sample_indices(num_sequences: int, share: float, seed: int) -> list[int]:
    """Returns the sorted indices of the sequences to read again: a share of all, the same for the same seed."""
    count = min(num_sequences, math.ceil(share * num_sequences))
    return sorted(np.random.default_rng([seed, num_sequences]).permutation(num_sequences)[:count].tolist())


def verify_cache(
    split: CacheSplit,
    chosen: Sequence[int],
    prompts: Sequence[Sequence[int]],
    recapture: Recapture,
    find_channels: FindChannels,
    *,
    tie_gap: float | None,
    is_exact: bool,
) -> CacheVerification:
    """Reads the `chosen` sequences again and compares tokens, channels and features.

    `prompts` are all rendered prompts of the split; `find_channels` computes a text's channels.
    A generated token whose logit lies more than `tie_gap` below the best is not the target's choice (None: a
    text from outside, judged as a whole when it was stored). Unless `is_exact` (float32) a few tokens may differ, as in
    `check`. Raises PipelineError naming shard and row of what differs.
    """
    found = []
    for first in range(0, len(chosen), READ_SEQUENCES):
        indices = chosen[first : first + READ_SEQUENCES]
        sequences = split.read(indices)
        texts = [sequence.token_ids.tolist() for sequence in sequences]
        for row, captured in recapture(texts, [split.prompt_ids[index] for index in indices]):
            index, sequence = indices[row], sequences[row]
            problem = _problem(sequence, prompts[index], find_channels)
            found.append(_compared(split.where(index), sequence, captured, split.layout.num_tapped, tie_gap, problem))
    _judge(found, is_exact)
    num_tokens = sum(difference.num_tokens for difference in found)
    return CacheVerification(len(found), num_tokens, max((difference.worst for difference in found), default=0.0))


def _problem(sequence: CachedSequence, prompt: Sequence[int], find_channels: FindChannels) -> str | None:
    if sequence.token_ids[: sequence.prompt_tokens].tolist() != list(prompt):
        return "does not begin with its prompt"
    if not np.array_equal(sequence.channels, find_channels(sequence.token_ids, sequence.prompt_tokens)):
        return "has other channels than its control tokens say"
    return None


def _compared(
    where: str,
    sequence: CachedSequence,
    captured: Captured,
    num_tapped: int,
    tie_gap: float | None,
    problem: str | None,
) -> _Difference:
    worst, num_off = 0.0, 0
    if sequence.features is not None:
        errors = relative_errors(sequence.features, captured.features, num_tapped).max(axis=1)
        worst, num_off = float(errors.max()), int((~(errors <= FEATURE_TOLERANCE)).sum())
    num_other = 0
    if tie_gap is not None:
        others = disagreements(captured, sequence.token_ids.tolist(), sequence.prompt_tokens)
        num_other = sum(disagreement.gap > tie_gap for disagreement in others)
    return _Difference(where, len(sequence.token_ids), worst, num_off, num_other, problem)


def _judge(found: Sequence[_Difference], is_exact: bool) -> None:
    num_tokens = sum(difference.num_tokens for difference in found)
    features_fail = sum(difference.num_off for difference in found) > (0 if is_exact else FEATURE_OUTLIERS * num_tokens)
    tokens_fail = sum(difference.num_other for difference in found) > (0 if is_exact else TOKEN_OUTLIERS * num_tokens)
    problems = []
    for difference in sorted(found, key=lambda each: (each.num_off + each.num_other, each.worst), reverse=True):
        if difference.problem is not None:
            problems.append(f"{difference.where} {difference.problem}")
        if difference.num_off and features_fail:
            problems.append(
                f"{difference.where}: the features of {difference.num_off} of {difference.num_tokens} tokens are not "
                f"the target's (the worst is off by {difference.worst:.1%})"
            )
        if difference.num_other and tokens_fail:
            problems.append(f"{difference.where}: {difference.num_other} tokens are not those that the target chooses")
    if problems:
        listed = "\n  ".join(problems[:SHOWN])
        raise PipelineError(
            f"the live target does not give what the teacher cache holds ({len(problems)} findings in {len(found)} "
            f"sequences read again); use the target it was made with, or delete the cache and make it again\n  {listed}"
        )
