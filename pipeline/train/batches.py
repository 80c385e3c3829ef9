"""Batches as a function of the step number: any step can be made alone, which is what resuming needs."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import ml_dtypes
import numpy as np
from jaxtyping import Int

from pipeline.dflash import blocks
from pipeline.teacher_cache.store import CachedSequence, CacheSplit

Item = TypeVar("Item")
LENGTH_STEP = 32  # padded lengths are multiples of it


def padded_length(num_tokens: Int[np.ndarray, " sequences"]) -> int:
    """The one length that every sequence is padded to: the longest, rounded up."""
    return -(-int(num_tokens.max()) // LENGTH_STEP) * LENGTH_STEP


def stack(sequences: Sequence[CachedSequence], num_positions: int) -> dict[str, np.ndarray]:
    """Sequences as rows of `num_positions` tokens: token_ids [B, T], generated [B, T], features [B, T, L*D]."""
    shape = (len(sequences), num_positions)
    token_ids = np.zeros(shape, dtype=np.int32)
    generated = np.zeros(shape, dtype=bool)
    features = np.zeros((*shape, sequences[0].features.shape[1]), dtype=ml_dtypes.bfloat16)
    for row, sequence in enumerate(sequences):
        length = len(sequence.token_ids)
        token_ids[row, :length] = sequence.token_ids
        generated[row, sequence.prompt_tokens : length] = True
        features[row, :length] = sequence.features
    return {"token_ids": token_ids, "generated": generated, "features": features}


class Batches:
    """Shuffled batches of a split with freshly drawn anchors.

    An epoch is one pass in an order drawn from (seed, epoch); the anchors of a sequence are drawn from
    (seed, epoch, sequence). A batch may end one epoch and begin the next.
    """

    def __init__(
        self, split: CacheSplit, *, num_sequences: int, num_anchors: int, num_positions: int, seed: int
    ) -> None:
        self._split = split
        self._num_sequences = num_sequences
        self._num_anchors = num_anchors
        self._num_positions = num_positions
        self._seed = seed
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)

    def at(self, step: int) -> dict[str, np.ndarray]:
        """The fields of `loss.Batch` for this step (0, 1, ...)."""
        total = self._split.num_sequences
        places = range(step * self._num_sequences, (step + 1) * self._num_sequences)
        drawn = [(place // total, int(self._order(place // total)[place % total])) for place in places]
        batch = stack(self._split.read([sequence for _, sequence in drawn]), self._num_positions)
        anchors = [
            blocks.draw_anchors(np.random.default_rng([self._seed, *key]), generated, self._num_anchors)
            for key, generated in zip(drawn, batch["generated"], strict=True)
        ]
        batch["anchors"] = np.stack([one for one, _ in anchors])
        batch["anchor_taken"] = np.stack([taken for _, taken in anchors])
        return batch

    def _shuffled(self, epoch: int) -> Int[np.ndarray, " sequences"]:
        return np.random.default_rng([self._seed, epoch]).permutation(self._split.num_sequences)


def made_ahead(make: Callable[[int], Item], start: int) -> Iterator[Item]:
    """make(start), make(start + 1), ... without end, the next one made while the last one is used."""
    with ThreadPoolExecutor(max_workers=1) as worker:
        ahead = worker.submit(make, start)
        for step in itertools.count(start + 1):
            ready = ahead.result()
            ahead = worker.submit(make, step)
            yield ready
