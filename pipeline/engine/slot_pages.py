"""The pages of the slots of all shards: where a request finds its own, and the tables that a step gets."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from pipeline.engine.layout import PageLayout
from pipeline.engine.page_pool import Key, keys_of
from pipeline.engine.row_pages import RowPages
from pipeline.engine.scheduler import NoRoom, Running
from pipeline.engine.step_rows import StepRows
from pipeline.model.layers.kv_pages import PageTables


class SlotPages:
    """Keeps the pages of every slot. Slots are numbered over all shards, rows within the shard of a slot."""

    def __init__(self, layout: PageLayout, *, slots_of_shard: int, num_shards: int, reuse: bool) -> None:
        self.layout, self.slots_of_shard, self.num_shards = layout, slots_of_shard, num_shards
        self._reuse = reuse
        self._shards = [RowPages(layout, slots_of_shard, reuse=reuse) for _ in range(num_shards)]

    @property
    def num_available(self) -> int:
        """The number of pages that can be taken, of layers that see everything."""
        return sum(pages.num_available for pages in self._shards)

    def keys_of(self, tokens: Sequence[int], before: Sequence[Key] = ()) -> list[Key]:
        """Returns the keys of the pages that tokens fill; none where nothing is reused."""
        return keys_of(tokens, self.layout.page_size, before) if self._reuse else []

    def open(self, one: Running, free: Sequence[int]) -> tuple[int, int] | None:
        """Gives a request a free slot, where most of its pages are or else most are free, and the slot's pages.

        Returns the slot and how many positions are computed already. Returns None while another request computes
        pages that this one can share, and raises NoRoom.
        """
        count = one.num_to_prefill
        found = []
        for shard in sorted({slot // self.slots_of_shard for slot in free}):
            pages = self._shards[shard]
            reusable = pages.num_reusable(one.keys, count)
            if pages.is_coming(one.keys[: (count - 1) // self.layout.page_size], reusable):
                return None
            if pages.can_open(reusable, one.keys, count):
                found.append((reusable, pages.num_available, shard))
        if not found:
            raise NoRoom
        reusable, _, shard = max(found, key=lambda each: each[:2])
        slot = next(slot for slot in reversed(free) if slot // self.slots_of_shard == shard)
        return slot, self._of(slot).open(self.row_of(slot), reusable, one.keys, count)

    def grow(self, slot: int, num_positions: int) -> bool:
        """Takes pages so that a slot has `num_positions`; returns False, with none taken, when there are too few."""
        return self._of(slot).grow(self.row_of(slot), num_positions)

    def commit(self, one: Running, length: int, *, num_pending: int = 0) -> None:
        """Names the pages that a request's first `length` tokens fill, of which `num_pending` are not in all caches."""
        self._of(one.slot).commit(self.row_of(one.slot), one.tokens, length, num_pending=num_pending)

    def close(self, slot: int) -> None:
        """Gives back all pages of a slot."""
        self._of(slot).close(self.row_of(slot))

    def row_of(self, slot: int) -> int:
        """Returns a slot's row in its shard."""
        return slot % self.slots_of_shard

    def row_tables(self, slot: int) -> Int[np.ndarray, "two M"]:
        """Returns a slot's rows of the tables, which are changed when the slot's pages are."""
        return self._of(slot).row_tables(self.row_of(slot))

    def tables(self, rows: StepRows) -> PageTables:
        """Returns the tables of a step's rows."""
        tables = [pages.tables() for pages in self._shards]
        if rows.indices is not None:
            parts = rows.indices.reshape(self.num_shards, -1)
            tables = [
                np.take(table, part, axis=1, mode="clip") for table, part in zip(tables, parts, strict=True)
            ]  # a row past the last slot is not active
        return PageTables(*(tables[0] if len(tables) == 1 else np.concatenate(tables, axis=1)))

    def _of(self, slot: int) -> RowPages:
        return self._shards[slot // self.slots_of_shard]
