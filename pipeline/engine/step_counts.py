"""What an engine's steps gave and took, and the block size that follows from it."""

import dataclasses
from collections.abc import Mapping, Sequence

from pipeline.dflash import acceptance
from pipeline.dflash.acceptance import Acceptance
from pipeline.engine.block_choice import BlockChoice, Estimate
from pipeline.engine.in_flight import Dispatched, EngineTimes


class StepCounts:
    """Counts accepted tokens, by block size, and seconds, and chooses block sizes for each number of rows.

    `acceptance` is that of blocks of the draft's own size, `smaller_blocks` that of each smaller size.
    """

    def __init__(self, block_size: int | None, sizes: Sequence[int], row_counts: Sequence[int]) -> None:
        self.block_size, self.sizes = block_size, tuple(sorted(sizes))
        self.acceptance = acceptance.empty(block_size or 1)
        self.smaller_blocks: dict[int, Acceptance] = {}
        self.times = EngineTimes()
        self._choices = {count: BlockChoice(sizes) for count in sorted(row_counts)}
        self._last_count = max(row_counts)  # rows of a shard in the last step that decoded

    @property
    def row_counts(self) -> tuple[int, ...]:
        """The numbers of rows that a round may have, the smallest first."""
        return tuple(self._choices)

    def choose_size(self, num_rows: int, *, is_constrained: bool) -> int:
        """Returns the block size of the next round of so many rows.

        Under a grammar it is the largest, of which draft and verification run apart, or 1.
        """
        self._last_count = num_rows
        size = self._choices[num_rows].choose()
        return self.sizes[-1] if is_constrained and size > 1 else size

    def estimates(self) -> Mapping[int, Estimate]:
        """Returns what is expected of every block size, for as many rows as the last round had.

        There are none where nothing is chosen.
        """
        return self._choices[self._last_count].estimates() if len(self.sizes) > 1 else {}

    def forget_times(self, num_rows: int) -> None:
        """Begins anew with the times of rounds of so many rows."""
        self._choices[num_rows] = BlockChoice(self.sizes)

    def took(self, num_rows: int, size: int, seconds: float) -> None:
        """Adds the time of a round of so many rows and a block size."""
        self._choices[num_rows].took(size, seconds)

    def reused(self, num_tokens: int) -> None:
        """Adds tokens whose pages were there already."""
        self.times = dataclasses.replace(self.times, reused_tokens=self.times.reused_tokens + num_tokens)

    def add(self, step: Dispatched, num_tokens: int, accepted: list[int], seconds: float, waited: float) -> None:
        """Adds a step that was read: its new tokens, the accepted ones of each row, its time and the host's wait."""
        times, size, wait_seconds = self.times, step.block_size, self.times.wait_seconds + waited
        if size is None:
            self.times = dataclasses.replace(
                times,
                prefill_tokens=times.prefill_tokens + sum(step.num_columns.values()),
                prefill_seconds=times.prefill_seconds + seconds,
                wait_seconds=wait_seconds,
            )
            return
        self.times = dataclasses.replace(
            times,
            decode_tokens=times.decode_tokens + num_tokens,
            decode_seconds=times.decode_seconds + seconds,
            wait_seconds=wait_seconds,
        )
        if not accepted:
            return
        if not step.is_masked:
            self.took(step.num_rows, size, seconds)
        for choice in self._choices.values():
            choice.accepted(size, accepted)
        if size == self.block_size:
            self.acceptance += Acceptance.of(accepted, size)
        elif size > 1:
            before = self.smaller_blocks.get(size, acceptance.empty(size))
            self.smaller_blocks = {**self.smaller_blocks, size: before + Acceptance.of(accepted, size)}
