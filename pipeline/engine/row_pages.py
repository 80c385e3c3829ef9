"""The pages of the slots of one shard: taken as rows grow, shared where rows begin alike, given back when they end."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from pipeline.engine.layout import PageLayout
from pipeline.engine.page_pool import Key, PagePool, keys_of
from pipeline.model.layers.kv_pages import NOWHERE, pages_for


@dataclasses.dataclass
class _Row:
    """Holds a slot's pages, and the keys of those whose tokens are all committed."""

    whole: list[int] = dataclasses.field(default_factory=list)
    sliding: list[int | None] = dataclasses.field(default_factory=list)  # None: given back, behind the window
    num_behind: int = 0  # leading pages that are behind the window
    keys: list[Key] = dataclasses.field(default_factory=list)
    coming: tuple[Key, ...] = ()  # of pages that this slot is prefilling


class RowPages:
    """Keeps the pages of all slots of a shard, and the tables that tell the device where they are.

    `whole` and `sliding` [slots, M] are the tables; they are replaced and never changed, for a step that is under way
    may still read them.
    """

    def __init__(self, layout: PageLayout, num_slots: int, *, reuse: bool) -> None:
        self._layout, self._reuse = layout, reuse
        self._pool, self._sliding_pool = PagePool(layout.num_pages), PagePool(layout.num_sliding_pages)
        self._rows = [_Row() for _ in range(num_slots)]
        self._coming: set[Key] = set()
        self._tables = np.full((2, num_slots, layout.pages_of_row), NOWHERE, np.int32)
        self._is_shared = False  # whether the tables went to a step since they were last copied

    @property
    def num_available(self) -> int:
        """The number of pages that can be taken, of layers that see everything."""
        return self._pool.num_available

    def tables(self) -> Int[np.ndarray, "two slots M"]:
        """Returns the tables, of layers that see everything and of sliding ones; they are not changed any more."""
        self._is_shared = True
        return self._tables

    def row_tables(self, slot: int) -> Int[np.ndarray, "two M"]:
        """Returns a slot's rows of the tables, which are changed when the slot's pages are."""
        return self._tables[:, slot]

    def num_reusable(self, keys: Sequence[Key], num_tokens: int) -> int:
        """Returns how many pages at the beginning of a row are there already; at least one token is left to compute.

        `keys` are those of the row's pages and `num_tokens` how many of its tokens are to be computed.
        """
        if not self._reuse:
            return 0
        most = min(len(keys), (num_tokens - 1) // self._layout.page_size)
        found = next((index for index in range(most) if self._pool.find(keys[index]) is None), most)
        return next((count for count in range(found, 0, -1) if self._has_window(keys, count)), 0)

    def is_coming(self, keys: Sequence[Key], num_reusable: int) -> bool:
        """Returns whether another slot is just prefilling the page behind the reusable ones."""
        return num_reusable < len(keys) and keys[num_reusable] in self._coming

    def can_open(self, num_reusable: int, keys: Sequence[Key], num_tokens: int) -> bool:
        """Returns whether there are pages for `num_tokens` tokens and one more, of which some pages are reused."""
        revived = sum(
            self._pool.num_users(page) == 0 for page in map(self._pool.find, keys[:num_reusable]) if page is not None
        )
        wanted = pages_for(num_tokens + 1, self._layout.page_size) - num_reusable
        return self._pool.num_available - revived >= wanted

    def open(self, slot: int, num_reusable: int, keys: Sequence[Key], num_tokens: int) -> int:
        """Gives a slot the reused pages and takes the others of `num_tokens` tokens; returns the reused positions."""
        row = self._rows[slot] = _Row(keys=list(keys[:num_reusable]))
        size = self._layout.page_size
        first = self._first_in_window(num_reusable * size)
        for index, key in enumerate(row.keys):
            page = self._pool.find(key)
            assert page is not None
            self._pool.share(page)
            row.whole.append(page)
            near = self._sliding_pool.find(key) if index >= first else None
            if near is not None:
                self._sliding_pool.share(near)
            row.sliding.append(near)
        row.num_behind = min(first, num_reusable)
        self._writable()[:, slot] = NOWHERE
        self._show(slot, 0)
        self._take_whole(slot, num_tokens)
        if self._reuse:
            row.coming = tuple(key for key in keys[num_reusable:] if key not in self._coming)
            self._coming.update(row.coming)
        return num_reusable * size

    def grow(self, slot: int, num_positions: int) -> bool:
        """Takes pages so that a slot has `num_positions`; returns False, with none taken, when there are too few."""
        if not self._take_whole(slot, num_positions):
            return False
        row = self._rows[slot]
        if self._layout.window is not None:
            first = len(row.sliding)
            while len(row.sliding) < min(pages_for(num_positions, self._layout.page_size), self._layout.pages_of_row):
                row.sliding.append(self._sliding_pool.take())
            if len(row.sliding) > first:
                self._show(slot, first)
        return True

    def commit(self, slot: int, tokens: Sequence[int], length: int, *, num_pending: int = 0) -> None:
        """Names the pages that the first `length` of `tokens` fill, and gives back those that no window shows again.

        The last `num_pending` of them are not in all caches yet.
        """
        row, size = self._rows[slot], self._layout.page_size
        if self._reuse:
            known, filled = len(row.keys), (length - num_pending) // size
            if filled > known:
                row.keys = keys_of(tokens[: filled * size], size, row.keys)
                for index in range(known, len(row.keys)):
                    self._pool.name(row.whole[index], row.keys[index])
                    near = row.sliding[index] if self._layout.window is not None else None
                    if near is not None:
                        self._sliding_pool.name(near, row.keys[index])
                    self._coming.discard(row.keys[index])
        if self._layout.window is not None:
            first = min(self._first_in_window(length), len(row.sliding))
            for index in range(row.num_behind, first):
                page = row.sliding[index]
                if page is not None:
                    self._sliding_pool.release(page)
                    row.sliding[index] = None
            row.num_behind = max(row.num_behind, first)

    def close(self, slot: int) -> None:
        """Gives back all pages of a slot, the last ones first: what a row begins with is useful for longer."""
        row = self._rows[slot]
        for page in reversed(row.whole):
            self._pool.release(page)
        for near in reversed(row.sliding):
            if near is not None:
                self._sliding_pool.release(near)
        self._coming.difference_update(row.coming)
        self._rows[slot] = _Row()
        self._writable()[:, slot] = NOWHERE

    def _has_window(self, keys: Sequence[Key], num_pages: int) -> bool:
        """Returns whether the sliding pages are there that a token behind `num_pages` pages sees."""
        if self._layout.window is None:
            return True
        first = self._first_in_window(num_pages * self._layout.page_size)
        return all(self._sliding_pool.find(keys[index]) is not None for index in range(first, num_pages))

    def _first_in_window(self, length: int) -> int:
        """Returns the first page of which the token at position `length` may see something in a sliding layer."""
        return max(0, length - (self._layout.window or 0) + 1) // self._layout.page_size

    def _take_whole(self, slot: int, num_positions: int) -> bool:
        row = self._rows[slot]
        first, wanted = len(row.whole), min(pages_for(num_positions, self._layout.page_size), self._layout.pages_of_row)
        if wanted - first > self._pool.num_available:
            return False
        if wanted > first:
            row.whole += [self._pool.take() for _ in range(wanted - first)]
            self._show(slot, first)
        return True

    def _show(self, slot: int, first: int) -> None:
        """Writes a slot's pages to the tables, from page number `first` on."""
        row, tables = self._rows[slot], self._writable()
        tables[0, slot, first : len(row.whole)] = row.whole[first:]
        near = [NOWHERE if page is None else page for page in row.sliding[first:]]
        tables[1, slot, first : first + len(near)] = near

    def _writable(self) -> Int[np.ndarray, "two slots M"]:
        if self._is_shared:
            self._tables, self._is_shared = self._tables.copy(), False
        return self._tables
