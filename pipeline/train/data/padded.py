"""Batches of one sequence a row, as a function of the step number, so that training can resume at any step."""

import functools

import numpy as np
from jaxtyping import Int

from pipeline.dflash import blocks
from pipeline.store.reader import CacheSplit
from pipeline.train.data.rows import padded_row_length, rows_of_host, stack


class PaddedBatches:
    """Makes shuffled batches of a split with freshly drawn anchors.

    An epoch shows every sequence once (a few twice, where the last batch must be filled) in an order drawn
    from (seed, epoch); the anchors of a sequence are drawn from (seed, epoch, sequence). Sequences of like
    length share a batch, for a block's attention costs as much as its row is long: rows are padded to one of
    `lengths`, one compiled step each. `host` is this host's index and the number of hosts; it reads only its own rows.
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
        """Returns this host's rows of the fields of a `TrainBatch` for this step (0, 1, ...)."""
        epoch, index = divmod(step, self.steps_per_epoch)
        drawn = self._epoch(epoch)[index]
        longest = int(self._split.num_tokens[drawn].max())
        length = next(length for length in self.lengths if length >= longest)  # the same on every host
        drawn = drawn[self._rows]
        batch = stack(self._split.read(drawn.tolist()), length)
        anchors_and_taken = [
            blocks.draw_anchors(np.random.default_rng([self._seed, epoch, sequence]), generated, self._num_anchors)
            for sequence, generated in zip(drawn.tolist(), batch["generated"], strict=True)
        ]
        batch["anchors"] = np.stack([anchors for anchors, _ in anchors_and_taken])
        batch["anchor_taken"] = np.stack([taken for _, taken in anchors_and_taken])
        return batch

    def _drawn(self, epoch: int) -> Int[np.ndarray, "steps sequences"]:
        """Draws the sequences of every batch of an epoch."""
        random = np.random.default_rng([self._seed, epoch])
        order = random.permutation(self._split.num_sequences)
        is_long = self._split.num_tokens[order] > self.lengths[0]
        order = np.concatenate([order[~is_long], order[is_long]])
        filled = np.resize(order, self.steps_per_epoch * self._num_sequences)  # with short ones, after the long
        return random.permutation(filled.reshape(self.steps_per_epoch, self._num_sequences))
