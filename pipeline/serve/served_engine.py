"""What the server needs of an engine: of this process's own, or of another program's."""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from pipeline.dflash.acceptance import Acceptance
from pipeline.engine.block_choice import Estimate
from pipeline.engine.config import EngineConfig
from pipeline.engine.in_flight import EngineTimes
from pipeline.engine.request import Request, StepUpdate


@runtime_checkable
class ServedEngine(Protocol):
    """Describes an engine that one thread steps; its counters may be read from others."""

    config: EngineConfig

    @property
    def block_size(self) -> int | None:
        """The draft's block size; None where nothing is drafted."""

    @property
    def num_preempted(self) -> int:
        """The number of requests that lost their pages for a while."""

    @property
    def acceptance(self) -> Acceptance:
        """What rounds of the draft's own block size accepted."""

    @property
    def smaller_blocks(self) -> Mapping[int, Acceptance]:
        """What rounds of smaller block sizes accepted, by their size."""

    @property
    def times(self) -> EngineTimes:
        """The tokens and seconds of all steps."""

    @property
    def block_estimates(self) -> Mapping[int, Estimate]:
        """What a round of each block size is expected to yield and to take; empty where nothing is chosen."""

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""

    @property
    def vocab_size(self) -> int:
        """The number of tokens that the target knows."""

    @property
    def num_waiting(self) -> int:
        """The number of requests without a slot."""

    @property
    def num_running(self) -> int:
        """The number of requests with a slot."""

    @property
    def num_pages(self) -> int:
        """The number of key/value pages."""

    @property
    def num_free_pages(self) -> int:
        """The number of key/value pages that no request uses."""

    def add_all(self, requests: Sequence[Request]) -> None:
        """Queues requests, all or none; raises PipelineError when one cannot be run."""

    def cancel(self, request_id: str) -> None:
        """Forgets a request; an unknown id is no error."""

    def step(self) -> list[StepUpdate]:
        """Works for a while, and returns what came of it."""
