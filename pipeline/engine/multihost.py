"""An engine over several hosts: the primary takes requests, and the others repeat its steps."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from pipeline import distributed
from pipeline.engine.config import EngineConfig
from pipeline.engine.engine import Engine
from pipeline.engine.grammar import Grammar
from pipeline.engine.request import Request, StepUpdate
from pipeline.engine.sampling_params import SamplingParams
from pipeline.model.dflash.model import DraftModel
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.parallel.runtime import SINGLE_DEVICE, Runtime

ADD, CANCEL, IDLE, END = "add", "cancel", "idle", "end"


class PrimaryEngine(Engine):
    """An engine that sends its requests and cancellations to the other hosts at every step.

    It does so from `start_broadcasting` on; until then all hosts must drive their engines alike (to warm up).
    """

    def __init__(
        self, target: TargetModel, draft: DraftModel | None, config: EngineConfig, runtime: Runtime = SINGLE_DEVICE
    ) -> None:
        super().__init__(target, draft, config, runtime)
        self._orders: list[list[Any]] = []
        self._is_broadcasting = False

    def start_broadcasting(self) -> None:
        """Sends every step from now on; the other hosts must be in `follow_primary`."""
        self._is_broadcasting = True

    def add_all(self, requests: Sequence[Request]) -> None:
        """Does what `Engine.add_all` does, on all hosts."""
        super().add_all(requests)
        if self._is_broadcasting:
            self._orders += [[ADD, _fields(request)] for request in requests]

    def cancel(self, request_id: str) -> None:
        """Does what `Engine.cancel` does, on all hosts."""
        super().cancel(request_id)
        if self._is_broadcasting:
            self._orders.append([CANCEL, request_id])

    def step(self) -> list[StepUpdate]:
        """Does what `Engine.step` does, on all hosts."""
        if self._is_broadcasting:
            distributed.broadcast_from_primary(self._orders)
            self._orders = []
        return super().step()

    def broadcast_idle(self) -> None:
        """Sends the other hosts that there is nothing to do, for a host that waits too long for a message gives up."""
        distributed.broadcast_from_primary([*self._orders, [IDLE, None]])
        self._orders = []

    def shut_down_followers(self) -> None:
        """Ends `follow_primary` on the other hosts."""
        distributed.broadcast_from_primary([[END, None]])


def follow_primary(engine: Engine, compile_grammar: Callable[[str], Grammar]) -> None:
    """Repeats on this host's engine what the primary's does, until `shut_down_followers`.

    `compile_grammar` makes a request's grammar of the text that the primary's was made of.
    """
    while True:
        orders = distributed.broadcast_from_primary(None)
        for order, value in orders:
            if order == ADD:
                engine.add(_request(value, compile_grammar))
            elif order == CANCEL:
                engine.cancel(value)
            elif order == END:
                return
        if not orders or orders[-1][0] != IDLE:
            engine.step()


def _fields(request: Request) -> dict[str, Any]:
    """Returns a request as JSON has it."""
    grammar = request.grammar
    fields = dataclasses.asdict(dataclasses.replace(request, grammar=None))
    return fields | {"grammar": None if grammar is None else grammar.text}


def _request(value: dict[str, Any], compile_grammar: Callable[[str], Grammar]) -> Request:
    sampling: dict[str, Any] = {
        name: _tuples(one) if isinstance(one, list) else one for name, one in value["sampling"].items()
    }
    return Request(
        request_id=value["request_id"],
        prompt_ids=tuple(value["prompt_ids"]),
        max_new_tokens=value["max_new_tokens"],
        sampling=SamplingParams(**sampling),
        grammar=None if value["grammar"] is None else compile_grammar(value["grammar"]),
    )


def _tuples(values: list[Any]) -> tuple[Any, ...]:
    """Returns a list that went through JSON as the tuple, perhaps of tuples, that it was."""
    return tuple(tuple(one) if isinstance(one, list) else one for one in values)
