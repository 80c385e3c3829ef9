"""An engine whose draft can be replaced while it serves: what runs ends with the old one, what comes has the new."""

import threading
from collections.abc import Mapping, Sequence

from pipeline.dflash.acceptance import Acceptance
from pipeline.engine.block_choice import Estimate
from pipeline.engine.config import EngineConfig
from pipeline.engine.engine import Engine
from pipeline.engine.in_flight import EngineTimes
from pipeline.engine.request import Request, StepUpdate
from pipeline.serve.served_engine import ServedEngine


class ReplaceableEngine:
    """Steps one engine, and beside it those that it replaced until their last request has ended.

    One thread owns it as it owns an engine; `replace` may be called from any thread, with an engine that is warm and of
    the same target and sizes.
    """

    def __init__(self, engine: ServedEngine, first: Engine) -> None:
        self.config: EngineConfig = engine.config
        self.first = first  # whose target and sizes those that come later have
        self.num_replaced = 0
        self._engine = engine
        self._ending: list[ServedEngine] = []
        self._lock = threading.Lock()
        self._next: ServedEngine | None = None

    def replace(self, engine: ServedEngine) -> None:
        """Lets requests that are added from now on run in another engine."""
        with self._lock:
            self._next = engine

    @property
    def block_size(self) -> int | None:
        """The present draft's block size."""
        return self._engine.block_size

    @property
    def num_preempted(self) -> int:
        """The number of requests that lost their pages for a while, in the present engine."""
        return self._engine.num_preempted

    @property
    def acceptance(self) -> Acceptance:
        """What the present draft's rounds of its own block size accepted."""
        return self._engine.acceptance

    @property
    def smaller_blocks(self) -> Mapping[int, Acceptance]:
        """What the present draft's rounds of smaller block sizes accepted."""
        return self._engine.smaller_blocks

    @property
    def times(self) -> EngineTimes:
        """The tokens and seconds of all steps of the present engine."""
        return self._engine.times

    @property
    def block_estimates(self) -> Mapping[int, Estimate]:
        """What a round of each block size is expected to yield and to take."""
        return self._engine.block_estimates

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self._engine.has_work or bool(self._ending) or self._next is not None

    @property
    def vocab_size(self) -> int:
        """The number of tokens that the target knows."""
        return self._engine.vocab_size

    @property
    def num_waiting(self) -> int:
        """The number of requests without a slot."""
        return sum(one.num_waiting for one in (self._engine, *self._ending))

    @property
    def num_running(self) -> int:
        """The number of requests with a slot."""
        return sum(one.num_running for one in (self._engine, *self._ending))

    @property
    def num_pages(self) -> int:
        """The number of key/value pages of the present engine."""
        return self._engine.num_pages

    @property
    def num_free_pages(self) -> int:
        """The number of key/value pages of the present engine that no request uses."""
        return self._engine.num_free_pages

    def add_all(self, requests: Sequence[Request]) -> None:
        """Queues requests in the newest engine; raises PipelineError when one cannot be run."""
        self._take_next()
        self._engine.add_all(requests)

    def cancel(self, request_id: str) -> None:
        """Forgets a request, whichever engine has it."""
        for one in (self._engine, *self._ending):
            one.cancel(request_id)

    def step(self) -> list[StepUpdate]:
        """Steps every engine that has work, and forgets a replaced one that has none any more."""
        self._take_next()
        updates = [update for one in (self._engine, *self._ending) if one.has_work for update in one.step()]
        self._ending = [one for one in self._ending if one.has_work]
        return updates

    def _take_next(self) -> None:
        with self._lock:
            engine, self._next = self._next, None
        if engine is None:
            return
        if self._engine.has_work:
            self._ending.append(self._engine)
        self._engine = engine
        self.num_replaced += 1
