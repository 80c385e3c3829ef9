"""The DFLASH runtime along texts that are known, where greedy decoding would write something else."""

import dataclasses
from typing import Any

import numpy as np

from pipeline.serve.engine import Engine, Update
from pipeline.serve.scheduler import Request

NO_TOKEN = -1  # behind the end of a text: no proposal equals it


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnownRequest(Request):
    """A prompt with its whole answer, `max_new_tokens` of them."""

    answer_ids: tuple[int, ...]


class ReplayEngine(Engine):
    """An engine with a draft whose requests are all `KnownRequest`s: their answers stand for the target's choices.

    Prefill, draft, verification and roll-back are the engine's own; only which tokens count as right is given.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, stop_token_ids=(), **options)  # a text ends where it ends
        self._given: dict[str, int] = {}

    def _prefill(self, group: dict[int, tuple[int, Request]]) -> list[Update]:
        """As the engine's, but for the first token, which is the answer's."""
        updates = super()._prefill(group)
        slots = [slot for slot, _ in group.values()]
        first = {request.request_id: request.answer_ids[0] for _, request in group.values()}
        anchor = self._state.anchor.at[np.array(slots)].set(np.array(list(first.values()), np.int32))
        self._state = dataclasses.replace(self._state, anchor=anchor)
        self._given |= dict.fromkeys(first, 1)
        return [dataclasses.replace(update, token_ids=(first[update.request_id],)) for update in updates]

    def _decode(self) -> list[Update]:
        running = self._scheduler.running
        answer = np.full((self.slots, self.block_size), NO_TOKEN, np.int32)
        for slot, request in running.items():
            start = self._given[request.request_id]
            part = request.answer_ids[start : start + self.block_size]
            answer[slot, : len(part)] = part
        self._state, given = self._programs.replay_round(
            self._weights, self._draft_weights, self._state, self._stop_ids, answer
        )
        updates = self._collect(given, {slot: slot for slot in running}, True)
        for update in updates:
            self._given[update.request_id] += len(update.token_ids)
        return updates
