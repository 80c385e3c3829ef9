"""Prompts of a benchmark that the draft was trained on, exactly or nearly: acceptance on them is not what users get."""

import collections
import dataclasses
import logging
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int, UInt64

from pipeline.errors import PipelineError
from pipeline.prompts.sources import Prompt
from pipeline.store.reader import CacheSplit

log = logging.getLogger("pipeline")

SHINGLE_TOKENS = 8
NEAR = 0.7  # of the shingles of either are in both: in a text of 60 tokens, one may be another
COMMON = 0.05  # of the training prompts have a shingle: it is the chat template's, and says nothing
READ_AT_ONCE = 256
FEW = 0.05  # of the prompts may nearly be training prompts by chance, where questions are made from a pattern
NUM_NAMED = 5


@dataclasses.dataclass(frozen=True)
class Leaks:
    """Holds the indices of prompts that are training prompts, and of those that nearly are."""

    exact: tuple[int, ...]
    near: tuple[int, ...]


def require_unseen(prompts: Sequence[Prompt], rendered: Sequence[Sequence[int]], split: CacheSplit | None) -> None:
    """Raises PipelineError when prompts are among those that the draft was trained on; None: they are not known.

    Prompts that nearly are, up to one in twenty, are a warning.
    """
    if split is None:
        log.warning(
            "bench: the draft's teacher cache is not under output_dir; whether it was trained on these prompts is not "
            "known"
        )
        return
    found = leaks_of([prompt.prompt_id for prompt in prompts], rendered, split)
    if found.near and not found.exact and len(found.near) <= FEW * len(prompts):
        log.warning(
            "bench: %d of %d prompts are nearly among the draft's training texts", len(found.near), len(prompts)
        )
    elif found.exact or found.near:
        named = ", ".join(f"prompt-{index}" for index in [*found.exact, *found.near][:NUM_NAMED])
        raise PipelineError(
            f"bench: of {len(prompts)} prompts, {len(found.exact)} are among the draft's training texts and "
            f"{len(found.near)} nearly ({named}); its acceptance there is not what users get: give other prompts, or "
            "the prompts.heldout_fraction that it was trained with"
        )


def leaks_of(prompt_ids: Sequence[str], rendered: Sequence[Sequence[int]], split: CacheSplit) -> Leaks:
    """Compares prompts with a cache's: by their ids, and by shingles of eight of their tokens."""
    trained = set(split.prompt_ids)
    exact = tuple(index for index, one in enumerate(prompt_ids) if one in trained)
    near = _near([shingles(ids) for ids in rendered], split)
    return Leaks(exact, tuple(index for index in near if index not in exact))


def shingles(token_ids: Sequence[int] | Int[np.ndarray, " T"]) -> UInt64[np.ndarray, " _"]:
    """Returns the hashes of all runs of eight tokens, each once, in order."""
    ids = np.asarray(token_ids, np.uint64)
    if len(ids) < SHINGLE_TOKENS:
        return np.zeros(0, np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(ids, SHINGLE_TOKENS)
    found = np.zeros(len(windows), np.uint64)
    for column in windows.T:  # a polynomial in an odd base, modulo 2^64
        found = found * np.uint64(0x9E3779B97F4A7C15) + column + np.uint64(1)
    return np.unique(found)


def _near(wanted: Sequence[UInt64[np.ndarray, " _"]], split: CacheSplit) -> list[int]:
    """Returns the indices of prompts whose shingles are nearly those of a training prompt."""
    known = np.unique(np.concatenate([np.zeros(0, np.uint64), *wanted]))
    shared, sizes = [], []
    for start in range(0, split.num_sequences, READ_AT_ONCE):
        indices = range(start, min(start + READ_AT_ONCE, split.num_sequences))
        for sequence in split.read(indices, features=False):
            found = shingles(sequence.token_ids[: sequence.prompt_tokens])
            shared.append(np.intersect1d(found, known, assume_unique=True))
            sizes.append(len(found))
    counts: Mapping[int, int] = collections.Counter(int(one) for found in shared for one in found)
    common = {one for one, count in counts.items() if count > COMMON * len(shared)}
    holders = collections.defaultdict(list)
    telling = [{int(one) for one in found} - common for found in wanted]
    for index, some in enumerate(telling):
        for one in some:
            holders[one].append(index)
    near = set()
    for found, size in zip(shared, sizes, strict=True):
        own = [int(one) for one in found if int(one) not in common]
        others = size - (len(found) - len(own))  # of the training prompt's shingles, without the common ones
        overlaps = collections.Counter(index for one in own for index in holders[one])
        for index, both in overlaps.items():
            if both >= NEAR * (len(telling[index]) + others - both):
                near.add(index)
    return sorted(near)
