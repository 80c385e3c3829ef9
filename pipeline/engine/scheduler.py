"""Which request sits in which slot. The scheduler knows no arrays, and the engine no policy."""

from pipeline.engine.request import Request


class Scheduler:
    """Gives a fixed number of slots to requests, in the order of their arrival."""

    def __init__(self, num_slots: int) -> None:
        self._free = list(reversed(range(num_slots)))
        self._waiting: dict[str, Request] = {}  # by id, in the order of arrival
        self._slot_of: dict[str, int] = {}
        self.running: dict[int, Request] = {}

    @property
    def num_waiting(self) -> int:
        """The number of requests without a slot."""
        return len(self._waiting)

    def knows(self, request_id: str) -> bool:
        """Returns whether a request is waiting or running."""
        return request_id in self._slot_of or request_id in self._waiting

    def add(self, request: Request) -> None:
        """Queues a request."""
        self._waiting[request.request_id] = request

    def admit(self) -> list[tuple[int, Request]]:
        """Gives free slots to waiting requests, oldest first; returns the new pairs."""
        admitted = []
        while self._free and self._waiting:
            slot, request = self._free.pop(), self._waiting.pop(next(iter(self._waiting)))
            self.running[slot] = request
            self._slot_of[request.request_id] = slot
            admitted.append((slot, request))
        return admitted

    def release(self, slot: int) -> None:
        """Frees the slot of a request that is done."""
        del self._slot_of[self.running.pop(slot).request_id]
        self._free.append(slot)

    def drop(self, request_id: str) -> int | None:
        """Forgets a request; returns the slot it held, now free, or None when it was waiting or unknown."""
        self._waiting.pop(request_id, None)
        slot = self._slot_of.get(request_id)
        if slot is not None:
            self.release(slot)
        return slot
