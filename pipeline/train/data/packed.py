"""Batches of rows that hold several sequences each, as a function of the step number."""

import functools

import numpy as np
from jaxtyping import Int

from pipeline.dflash import blocks
from pipeline.store.reader import CacheSplit
from pipeline.train.data import packing
from pipeline.train.data.rows import lay_out, rows_of_host


class PackedBatches:
    """Makes batches of `num_rows` rows of `row_tokens` tokens, into which sequences are packed: one compiled shape.

    An epoch shows every sequence exactly once; rows that its last batch lacks are empty. Which sequences share a row is
    drawn from (seed, epoch) among those of equal length; the anchors of a sequence are those that `PaddedBatches`
    draws, and `host` is as there. Raises PipelineError when a sequence is longer than a row.
    """

    def __init__(
        self,
        split: CacheSplit,
        *,
        num_rows: int,
        row_tokens: int,
        num_anchors: int,
        seed: int,
        host: tuple[int, int] = (0, 1),
    ) -> None:
        packing.require_sequences_fit(split.num_tokens, row_tokens)
        self._split = split
        self._rows = rows_of_host(num_rows, *host)
        self._num_rows, self._row_tokens, self._seed = num_rows, row_tokens, seed
        # no block starts at a prompt token or at the last token
        self._num_anchors = np.clip(split.num_tokens - split.prompt_tokens - 1, 0, num_anchors)
        self.row_anchors = packing.anchors_per_row(split.num_tokens, self._num_anchors, row_tokens)
        self._costs = packing.costs_of(split.num_tokens, self._num_anchors, row_tokens, self.row_anchors)
        self._epoch = functools.lru_cache(maxsize=2)(self._drawn)
        self.num_filled = len(self._packed(np.arange(split.num_sequences)))  # the same in every epoch
        self.steps_per_epoch = -(-self.num_filled // num_rows)
        self.sequences_per_step = split.num_sequences / self.steps_per_epoch  # on average

    def at(self, step: int) -> dict[str, np.ndarray]:
        """Returns this host's rows of the fields of a `TrainBatch` for this step (0, 1, ...)."""
        epoch, index = divmod(step, self.steps_per_epoch)
        rows = self._epoch(epoch)[index * self._num_rows : (index + 1) * self._num_rows]
        rows = (rows + [[]] * (self._num_rows - len(rows)))[self._rows]
        read = iter(self._split.read([sequence for row in rows for sequence in row]))
        batch = lay_out([[next(read) for _ in row] for row in rows], self._row_tokens, self._split.feature_size)
        anchors, taken = np.zeros((2, len(rows), self.row_anchors), dtype=np.int32)
        for number, row in enumerate(rows):
            drawn = self._anchors(epoch, row, batch["generated"][number])
            anchors[number, : len(drawn)], taken[number, : len(drawn)] = drawn, 1
        return batch | {"anchors": anchors, "anchor_taken": taken.astype(bool)}

    def _anchors(self, epoch: int, row: list[int], generated: np.ndarray) -> Int[np.ndarray, " taken"]:
        """Draws the anchors of a row's sequences, each sequence's by itself; returns their positions in the row."""
        found, start = [np.zeros(0, dtype=np.int32)], 0
        for sequence in row:
            end = start + int(self._split.num_tokens[sequence])
            random = np.random.default_rng([self._seed, epoch, sequence])
            anchors, taken = blocks.draw_anchors(random, generated[start:end], int(self._num_anchors[sequence]))
            found.append(start + anchors[taken])
            start = end
        return np.concatenate(found)

    def _drawn(self, epoch: int) -> list[list[int]]:
        """Returns the rows of an epoch in order."""
        random = np.random.default_rng([self._seed, epoch])
        rows = self._packed(random.permutation(self._split.num_sequences))
        return [rows[index] for index in random.permutation(len(rows))]

    def _packed(self, order: Int[np.ndarray, " S"]) -> list[list[int]]:
        descending = order[np.argsort(-self._costs[order], kind="stable")]
        return packing.pack(self._costs, descending.tolist(), self._row_tokens)
