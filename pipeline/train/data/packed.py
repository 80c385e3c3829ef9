"""Batches of rows that hold several sequences each, as a function of the step number."""

import functools

import numpy as np
from jaxtyping import Int

from pipeline.dflash import blocks
from pipeline.store.reader import CacheSplit
from pipeline.train.data import packing
from pipeline.train.data.rows import lay_out, rows_of_host


class PackedBatches:
    """As `Batches`, of `num_rows` rows of `row_tokens` tokens, into which sequences are packed: one compiled shape.

    An epoch shows every sequence exactly once; rows that the last batch of a draw lacks are empty. Which sequences
    share a row is drawn from (seed, epoch) among those of equal length; the anchors of a sequence are those that
    `Batches` draws; `host` as there. Raises PipelineError when a sequence is longer than a row.
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
        packing.require_fitting(split.num_tokens, row_tokens)
        self._split = split
        self._rows = rows_of_host(num_rows, *host)
        self._num_rows, self._row_tokens, self._seed = num_rows, row_tokens, seed
        # a block starts at no prompt token, and not at the last token
        self._num_anchors = np.clip(split.num_tokens - split.prompt_tokens - 1, 0, num_anchors)
        self.row_anchors = packing.anchors_per_row(split.num_tokens, self._num_anchors, row_tokens)
        self._costs = packing.costs_of(split.num_tokens, self._num_anchors, row_tokens, self.row_anchors)
        self._epoch = functools.lru_cache(maxsize=2)(self._drawn)
        self.num_filled = len(self._packed(np.arange(split.num_sequences)))  # the same in every epoch
        self.steps_per_epoch = -(-self.num_filled // num_rows)
        self.sequences_per_step = split.num_sequences / self.steps_per_epoch  # on average

    def at(self, step: int) -> dict[str, np.ndarray]:
        """The fields of `loss.Batch` for this step (0, 1, ...)."""
        epoch, place = divmod(step, self.steps_per_epoch)
        rows = self._epoch(epoch)[place * self._num_rows : (place + 1) * self._num_rows]
        rows = (rows + [[]] * (self._num_rows - len(rows)))[self._rows]
        read = iter(self._split.read([sequence for row in rows for sequence in row]))
        batch = lay_out([[next(read) for _ in row] for row in rows], self._row_tokens, self._split.feature_size)
        anchors, taken = np.zeros((2, len(rows), self.row_anchors), dtype=np.int32)
        for index, row in enumerate(rows):
            found = self._anchors(epoch, row, batch["generated"][index])
            anchors[index, : len(found)], taken[index, : len(found)] = found, 1
        return batch | {"anchors": anchors, "anchor_taken": taken.astype(bool)}

    def _anchors(self, epoch: int, row: list[int], generated: np.ndarray) -> Int[np.ndarray, " taken"]:
        """The anchors of a row's sequences, each drawn by itself, as places in the row."""
        found, start = [np.zeros(0, dtype=np.int32)], 0
        for sequence in row:
            end = start + int(self._split.num_tokens[sequence])
            random = np.random.default_rng([self._seed, epoch, sequence])
            anchors, taken = blocks.draw_anchors(random, generated[start:end], int(self._num_anchors[sequence]))
            found.append(start + anchors[taken])
            start = end
        return np.concatenate(found)

    def _drawn(self, epoch: int) -> list[list[int]]:
        """The rows of an epoch in order."""
        random = np.random.default_rng([self._seed, epoch])
        rows = self._packed(random.permutation(self._split.num_sequences))
        return [rows[index] for index in random.permutation(len(rows))]

    def _packed(self, order: Int[np.ndarray, " S"]) -> list[list[int]]:
        descending = order[np.argsort(-self._costs[order], kind="stable")]
        return packing.pack(self._costs, descending.tolist(), self._row_tokens)
