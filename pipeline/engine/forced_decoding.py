"""The engine along answers that are known in advance, where greedy decoding could write others."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from pipeline.engine.config import EngineConfig
from pipeline.engine.engine import Engine
from pipeline.engine.request import ForcedRequest, Request, StepUpdate
from pipeline.model.dflash.model import DraftModel
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.parallel.runtime import SINGLE_DEVICE, Runtime

NO_TOKEN = -1  # behind the end of a text: no drafted token equals it


class ForcedDecodingEngine(Engine):
    """An engine with a draft whose requests are all `ForcedRequest`s: their answers stand for the target's choices.

    Prefill, draft, verification and roll-back are those of `Engine`; only the tokens that count as correct are forced.
    A generation ends with the last forced token: the stop tokens of `config` have no effect.
    """

    def __init__(
        self, target: TargetModel, draft: DraftModel, config: EngineConfig, runtime: Runtime = SINGLE_DEVICE
    ) -> None:
        super().__init__(target, draft, dataclasses.replace(config, stop_token_ids=()), runtime)
        self._num_forced: dict[str, int] = {}

    def prefill_first_tokens(self, group: Mapping[int, tuple[int, Request]]) -> list[StepUpdate]:
        """Prefills as `Engine` does, and replaces the first tokens by those of the answers."""
        updates = super().prefill_first_tokens(group)
        slots = [slot for slot, _ in group.values()]
        first = {request.request_id: _forced(request)[0] for _, request in group.values()}
        anchor = self._state.anchor.at[np.array(slots)].set(np.array(list(first.values()), np.int32))
        self._state = dataclasses.replace(self._state, anchor=anchor)
        self._num_forced |= dict.fromkeys(first, 1)
        return [dataclasses.replace(update, token_ids=(first[update.request_id],)) for update in updates]

    def decode_round(self) -> list[StepUpdate]:
        """Runs one DFLASH round in which the next tokens of the answers stand for what the target would choose."""
        assert self.block_size is not None, "an engine of forced requests has a draft"
        forced_ids = np.full((self.config.num_slots, self.block_size), NO_TOKEN, np.int32)
        for slot, request in self._scheduler.running.items():
            start = self._num_forced[request.request_id]
            part = _forced(request)[start : start + self.block_size]
            forced_ids[slot, : len(part)] = part
        self._state, output = self._steps.forced_round(
            self._target, self._draft, self._state, self._stop_ids, forced_ids
        )
        updates = self._collect_round(output)
        for update in updates:
            self._num_forced[update.request_id] += len(update.token_ids)
        return updates


def _forced(request: Request) -> tuple[int, ...]:
    assert isinstance(request, ForcedRequest), request
    return request.forced_ids
