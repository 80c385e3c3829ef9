"""Which request sits in which slot. The scheduler knows no arrays and no pages, and the engine no policy."""

import dataclasses
from collections.abc import Callable

from pipeline.engine.grammar import Constraint
from pipeline.engine.page_pool import Key
from pipeline.engine.request import Request, TokenLogProb


@dataclasses.dataclass(eq=False)
class Running:
    """Holds what the host knows of a request: its tokens so far, and how far they are computed.

    `tokens` are the prompt's and those of the answer that were read from the device; all but the last one of an answer
    are to be in the cache before the request decodes. `keys` are those of the pages that the tokens filled when the
    request was queued. `num_reused` of the prompt's tokens were computed for earlier requests. `num_prefilled` counts
    the tokens that prefill has dispatched, `rounds_ahead` the rounds that were dispatched and not read yet, and
    `tokens_ahead` what these yield at most. `constraint` has taken the tokens of the answer that are known.
    """

    request: Request
    order: int
    tokens: list[int]
    keys: list[Key]
    constraint: Constraint | None = None
    slot: int = -1
    num_reused: int = 0
    num_prefilled: int = 0
    last_prefill: int = -1  # the step that prefilled a chunk of it last
    is_decoding: bool = False
    rounds_ahead: int = 0
    tokens_ahead: int = 0
    prompt_log_probs: list[TokenLogProb] = dataclasses.field(default_factory=list)

    @property
    def num_generated(self) -> int:
        """The number of tokens of the answer that are known."""
        return len(self.tokens) - len(self.request.prompt_ids)

    @property
    def num_to_prefill(self) -> int:
        """The number of tokens that must be in the cache before the request decodes."""
        return len(self.tokens) - (1 if self.num_generated else 0)

    @property
    def is_surely_done(self) -> bool:
        """Whether the rounds that were dispatched reach the request's length, for each yields a token at least."""
        first_is_coming = int(self.is_decoding and self.num_generated == 0)
        return self.num_generated + first_is_coming + self.rounds_ahead >= self.request.max_new_tokens


class Scheduler:
    """Gives a fixed number of slots to requests, in the order of their arrival as far as there is room."""

    def __init__(self, num_slots: int) -> None:
        self._free = list(reversed(range(num_slots)))
        self._waiting: dict[str, Running] = {}  # by id, in the order of arrival
        self._slot_of: dict[str, int] = {}
        self._num_added = 0
        self.running: dict[int, Running] = {}

    @property
    def num_waiting(self) -> int:
        """The number of requests without a slot."""
        return len(self._waiting)

    def knows(self, request_id: str) -> bool:
        """Returns whether a request is waiting or running."""
        return request_id in self._slot_of or request_id in self._waiting

    def add(self, request: Request, keys: list[Key]) -> None:
        """Queues a request, with the keys of the pages that its prompt fills."""
        constraint = None if request.grammar is None else request.grammar.start()
        self._waiting[request.request_id] = Running(
            request, self._num_added, list(request.prompt_ids), keys, constraint
        )
        self._num_added += 1

    def admit(self, slot_for: Callable[[Running, list[int]], int | None]) -> None:
        """Gives free slots to waiting requests, oldest first.

        `slot_for` chooses among the free slots, or returns None while the request has to wait for what another one is
        computing; the requests behind it do not wait with it. Where it finds no room it raises NoRoom, and nobody
        overtakes: large requests would starve.
        """
        for one in list(self._waiting.values()):
            if not self._free:
                break
            try:
                slot = slot_for(one, self._free)
            except NoRoom:
                break
            if slot is None:
                continue
            self._free.remove(slot)
            del self._waiting[one.request.request_id]
            one.slot = slot
            self.running[slot] = one
            self._slot_of[one.request.request_id] = slot

    def to_prefill(self) -> list[Running]:
        """Returns the requests whose prompts are not computed yet: new ones first, then who has waited longest.

        So a prompt of one chunk never waits behind longer ones.
        """
        coming = [one for one in self.running.values() if not one.is_decoding]
        return sorted(coming, key=lambda one: (one.last_prefill, one.order))

    def release(self, slot: int) -> None:
        """Frees the slot of a request that is done."""
        del self._slot_of[self.running.pop(slot).request.request_id]
        self._free.append(slot)

    def youngest(self) -> Running:
        """Returns the running request that arrived last."""
        return max(self.running.values(), key=lambda one: one.order)

    def preempt(self, one: Running, keys: list[Key]) -> None:
        """Takes a request's slot; it will go on later from the tokens that it has, which fill pages with these keys."""
        self.release(one.slot)
        again = Running(one.request, one.order, one.tokens, keys, one.constraint, num_reused=one.num_reused)
        waiting = [*self._waiting.values(), again]
        self._waiting = {each.request.request_id: each for each in sorted(waiting, key=lambda each: each.order)}

    def drop(self, request_id: str) -> int | None:
        """Forgets a request; returns the slot it held, now free, or None when it was waiting or unknown."""
        self._waiting.pop(request_id, None)
        slot = self._slot_of.get(request_id)
        if slot is not None:
            self.release(slot)
        return slot


class NoRoom(Exception):
    """Says that there are too few pages for a request at the moment."""
