"""Batches as a function of the step number: any step can be made alone, which is what resuming needs."""

import collections
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import ml_dtypes
import numpy as np
from jaxtyping import Int

from pipeline.artifacts import PipelineError
from pipeline.dflash import blocks
from pipeline.teacher_cache.store import CachedSequence, CacheSplit

Item = TypeVar("Item")
LENGTH_STEP = 32  # padded lengths are multiples of it
AHEAD = 4  # batches; one of eight sequences of gpt-oss's features takes 0.7 GB


def padded_length(num_tokens: Int[np.ndarray, " sequences"], *, divisor: int = 1) -> int:
    """The length of the longest sequence, or its half (`divisor` 2), rounded up."""
    return -(-int(num_tokens.max()) // (divisor * LENGTH_STEP)) * LENGTH_STEP


def stack(sequences: Sequence[CachedSequence], num_positions: int) -> dict[str, np.ndarray]:
    """Sequences as rows of `num_positions` tokens: token_ids [B, T], generated [B, T], features [B, T, L*D]."""
    width = 0 if sequences[0].features is None else sequences[0].features.shape[1]
    fields = lay_out([[sequence] for sequence in sequences], num_positions, width)
    del fields["starts"]
    return fields


def lay_out(rows: Sequence[Sequence[CachedSequence]], num_positions: int, width: int) -> dict[str, np.ndarray]:
    """As `stack` for rows that hold any number of sequences, end to end; `starts` [B, T] says where each begins.

    Features are `width` wide; 0 where the target makes them later.
    """
    shape = (len(rows), num_positions)
    token_ids = np.zeros(shape, dtype=np.int32)
    generated = np.zeros(shape, dtype=bool)
    features = np.zeros((*shape, width), dtype=ml_dtypes.bfloat16)
    starts = np.full(shape, num_positions, dtype=np.int32)
    for row, sequences in enumerate(rows):
        start = 0
        for sequence in sequences:
            end = start + len(sequence.token_ids)
            token_ids[row, start:end] = sequence.token_ids
            generated[row, start + sequence.prompt_tokens : end] = True
            if width:
                features[row, start:end] = sequence.features
            starts[row, start:end] = start
            start = end
    return {"token_ids": token_ids, "generated": generated, "features": features, "starts": starts}


class Batches:
    """Shuffled batches of a split with freshly drawn anchors.

    An epoch shows every sequence once (a few twice, where the last batch must be filled) in an order drawn
    from (seed, epoch); the anchors of a sequence are drawn from (seed, epoch, sequence). Sequences of like
    length share a batch, for a block's attention costs what its row is padded to: rows are padded to one of
    `lengths`, one compiled step each. `host` is which of how many hosts this is: it reads its rows of each batch alone.
    """

    def __init__(
        self, split: CacheSplit, *, num_sequences: int, num_anchors: int, seed: int, host: tuple[int, int] = (0, 1)
    ) -> None:
        self._split = split
        self._num_sequences = num_sequences
        self._num_anchors = num_anchors
        self._rows = rows_of_host(num_sequences, *host)
        self._seed = seed
        self.lengths = (padded_length(split.num_tokens, divisor=2), padded_length(split.num_tokens))
        self.steps_per_epoch = -(-split.num_sequences // num_sequences)
        self.sequences_per_step = float(num_sequences)
        self._epoch = functools.lru_cache(maxsize=2)(self._drawn)

    def at(self, step: int) -> dict[str, np.ndarray]:
        """The fields of `loss.Batch` for this step (0, 1, ...), this host's rows of them."""
        epoch, place = divmod(step, self.steps_per_epoch)
        drawn = self._epoch(epoch)[place]
        longest = int(self._split.num_tokens[drawn].max())
        length = next(length for length in self.lengths if length >= longest)  # the same on every host
        drawn = drawn[self._rows]
        batch = stack(self._split.read(drawn.tolist()), length)
        anchors = [
            blocks.draw_anchors(np.random.default_rng([self._seed, epoch, sequence]), generated, self._num_anchors)
            for sequence, generated in zip(drawn.tolist(), batch["generated"], strict=True)
        ]
        batch["anchors"] = np.stack([one for one, _ in anchors])
        batch["anchor_taken"] = np.stack([taken for _, taken in anchors])
        return batch

    def _drawn(self, epoch: int) -> Int[np.ndarray, "steps sequences"]:
        """The sequences of every batch of an epoch."""
        random = np.random.default_rng([self._seed, epoch])
        order = random.permutation(self._split.num_sequences)
        is_long = self._split.num_tokens[order] > self.lengths[0]
        order = np.concatenate([order[~is_long], order[is_long]])
        filled = np.resize(order, self.steps_per_epoch * self._num_sequences)  # with short ones, behind the long
        return random.permutation(filled.reshape(self.steps_per_epoch, self._num_sequences))


def rows_of_host(num_sequences: int, index: int, count: int) -> slice:
    """Which rows of a batch the host `index` of `count` reads; PipelineError when they cannot be shared out evenly."""
    if num_sequences % count:
        raise PipelineError(
            f"train.batch_sequences is {num_sequences}; {count} hosts read equal parts of a batch: give a multiple of "
            f"{count}"
        )
    own = num_sequences // count
    return slice(index * own, (index + 1) * own)


def made_ahead(make: Callable[[int], Item], start: int, *, ahead: int = AHEAD) -> Iterator[Item]:
    """make(start), make(start + 1), ... without end and in order, `ahead` of them made in threads while one is used.

    What `make` raises is raised in its turn. grain's ReadOptions do the same: measured beside this they kept a
    trainer as busy (0.83 of the time where reads of 41 ms on average, some of 200, met steps of 20), and cost 1.4
    seconds to import.
    """
    pool = ThreadPoolExecutor(ahead, thread_name_prefix="made-ahead")
    try:
        begun = collections.deque(pool.submit(make, step) for step in range(start, start + ahead))
        for step in itertools.count(start + ahead):
            ready = begun.popleft().result()
            begun.append(pool.submit(make, step))
            yield ready
    finally:  # also when the trainer is interrupted: what has not begun never begins
        pool.shutdown(wait=False, cancel_futures=True)
