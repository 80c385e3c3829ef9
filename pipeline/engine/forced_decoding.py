"""The engine along answers that are known in advance, where greedy decoding could write others."""

import dataclasses

import numpy as np

from pipeline.engine.config import EngineConfig
from pipeline.engine.engine import Engine
from pipeline.engine.request import ForcedRequest
from pipeline.engine.scheduler import Running
from pipeline.engine.state import StepOutput
from pipeline.engine.step_rows import StepRows
from pipeline.model.dflash.model import DraftModel
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.parallel.runtime import SINGLE_DEVICE, Runtime

NO_TOKEN = -1  # behind the end of a text: no drafted token equals it


class ForcedDecodingEngine(Engine):
    """An engine with a draft whose requests are all `ForcedRequest`s: their answers stand for the target's choices.

    Prefill, draft, verification and roll-back are those of `Engine`; only the tokens that count as correct are forced.
    A generation ends with the last forced token: the stop tokens of `config` have no effect.
    """

    steps_ahead = 0  # where a round begins in the answer follows from what the one before it accepted

    def __init__(
        self, target: TargetModel, draft: DraftModel, config: EngineConfig, runtime: Runtime = SINGLE_DEVICE
    ) -> None:
        config = dataclasses.replace(config, stop_token_ids=(), block_sizes=(), row_counts=(), samples=False)
        super().__init__(target, draft, config, runtime)

    def _first_id(self, one: Running) -> int:
        """Returns the answer's first token, or the last one that is known of a preempted answer."""
        return _forced(one)[max(one.num_generated - 1, 0)]

    def _dispatch_round(self, rows: StepRows, size: int) -> StepOutput:
        """Dispatches one DFLASH round in which the answers' next tokens stand for what the target would choose."""
        forced_ids = np.full((self.config.num_slots, size), NO_TOKEN, np.int32)
        for slot, one in rows.by_row.items():
            start = max(one.num_generated, 1)  # the first token is not read yet when its round is dispatched
            part = _forced(one)[start : start + size]
            forced_ids[slot, : len(part)] = part
        self._state, output = self._steps.forced_round(
            self._target, self._draft, self._state, self._pages.tables(rows), rows.indices, forced_ids
        )
        return output


def _forced(one: Running) -> tuple[int, ...]:
    assert isinstance(one.request, ForcedRequest), one.request
    return one.request.forced_ids
