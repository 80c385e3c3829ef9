"""Which pages are free, who uses the others, and which of them hold tokens that a later request may begin with."""

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

Key = bytes  # of all tokens from the first one to the end of a page


class PagePool:
    """Hands out the pages of one shard's layers of one kind; it deals in page numbers alone.

    A page whose tokens are named keeps them when its last user goes, until a page is wanted and none is free: then the
    one goes first that was used least recently.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(reversed(range(num_pages)))
        self._num_users = [0] * num_pages
        self._key_of: dict[int, Key] = {}
        self._page_of: dict[Key, int] = {}
        self._unused: dict[int, None] = {}  # named pages without a user, least recently used first

    @property
    def num_available(self) -> int:
        """The number of pages that can be taken: free ones, and named ones without a user."""
        return len(self._free) + len(self._unused)

    def take(self) -> int:
        """Returns a page for one user; there must be an available one."""
        if self._free:
            page = self._free.pop()
        else:
            page = next(iter(self._unused))
            del self._unused[page]
            del self._page_of[self._key_of.pop(page)]
        self._num_users[page] = 1
        return page

    def share(self, page: int) -> None:
        """Adds a user to a named page."""
        self._unused.pop(page, None)
        self._num_users[page] += 1

    def release(self, page: int) -> None:
        """Takes a user from a page."""
        self._num_users[page] -= 1
        if self._num_users[page] == 0:
            if page in self._key_of:
                self._unused[page] = None
            else:
                self._free.append(page)

    def name(self, page: int, key: Key) -> None:
        """Remembers which tokens a page holds and follows; a second page with the same ones stays without a name."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def find(self, key: Key) -> int | None:
        """Returns the page that holds these tokens, if there is one."""
        return self._page_of.get(key)

    def num_users(self, page: int) -> int:
        """Returns how many use a page."""
        return self._num_users[page]


def keys_of(tokens: Sequence[int], page_size: int, before: Sequence[Key] = ()) -> list[Key]:
    """Returns the keys of all pages that `tokens` fill; those of the first pages are already known."""
    keys = list(before)
    for index in range(len(keys), len(tokens) // page_size):
        part = np.asarray(tokens[index * page_size : (index + 1) * page_size], np.int32)
        keys.append(blake2b((keys[-1] if keys else b"") + part.tobytes(), digest_size=16).digest())
    return keys
