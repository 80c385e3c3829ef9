"""Which request sits in which slot. Knows no arrays; the engine knows no policy."""

import collections
import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to continue by at most `max_new_tokens` tokens; `key` (`sampling.key_of`) where they are sampled."""

    request_id: str
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    key: tuple[int, int] | None = None


class Scheduler:
    """First come, first served, over a fixed number of slots."""

    def __init__(self, slots: int) -> None:
        self._free = list(reversed(range(slots)))
        self._waiting: collections.deque[Request] = collections.deque()
        self._slot_of: dict[str, int] = {}
        self.running: dict[int, Request] = {}

    @property
    def num_waiting(self) -> int:
        """Requests without a slot yet."""
        return len(self._waiting)

    def knows(self, request_id: str) -> bool:
        """Whether a request is waiting or running."""
        return request_id in self._slot_of or any(one.request_id == request_id for one in self._waiting)

    def add(self, request: Request) -> None:
        """Queue a request."""
        self._waiting.append(request)

    def admit(self) -> list[tuple[int, Request]]:
        """Give free slots to waiting requests, oldest first; returns the new pairs."""
        admitted = []
        while self._free and self._waiting:
            slot, request = self._free.pop(), self._waiting.popleft()
            self.running[slot] = request
            self._slot_of[request.request_id] = slot
            admitted.append((slot, request))
        return admitted

    def release(self, slot: int) -> None:
        """Free the slot of a request that is done."""
        del self._slot_of[self.running.pop(slot).request_id]
        self._free.append(slot)

    def drop(self, request_id: str) -> int | None:
        """Forget a request; returns the slot it held, now free, or None when it was waiting or unknown."""
        self._waiting = collections.deque(one for one in self._waiting if one.request_id != request_id)
        slot = self._slot_of.get(request_id)
        if slot is not None:
            self.release(slot)
        return slot
