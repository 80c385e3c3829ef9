"""Batches as a function of the step number: any step can be made alone, which is what resuming needs."""

import functools

import numpy as np
from jaxtyping import Int

from pipeline.dflash import blocks
from pipeline.store.reader import CacheSplit
from pipeline.train.data.rows import padded_row_length, rows_of_host, stack


class PaddedBatches:
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
        self.lengths = (padded_row_length(split.num_tokens, divisor=2), padded_row_length(split.num_tokens))
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
