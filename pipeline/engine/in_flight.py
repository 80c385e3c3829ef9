"""Steps that were dispatched and not read yet, in order, and the time that each of them took."""

import collections
import dataclasses
import time
from collections.abc import Mapping

import jax

from pipeline.engine.scheduler import Running
from pipeline.engine.state import StepOutput

LOG_PROBS = ("logprobs", "prompt_logprobs")


@dataclasses.dataclass(frozen=True)
class Dispatched:
    """Holds a step that the devices will have run, and whose row each request has in it.

    `block_size` is a round's, 1 for a plain step and None for a prefill, which computes `num_columns` of a row; a
    round has `num_rows` rows of each shard. A step `is_masked` when the host had to see the tokens before it first, so
    that its time says nothing of other steps.
    """

    output: StepOutput
    by_row: Mapping[int, Running]
    block_size: int | None
    num_columns: Mapping[int, int] = dataclasses.field(default_factory=dict)
    num_rows: int = 0
    is_masked: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineTimes:
    """Holds the tokens and seconds of an engine's two phases. The first token of an answer counts to prefill.

    `prefill_tokens` are those that were computed, `reused_tokens` those whose pages were there already. In
    `wait_seconds` of both phases the host waited for the devices.
    """

    prefill_tokens: int = 0
    reused_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    wait_seconds: float = 0.0

    @property
    def host_seconds(self) -> float:
        """Returns the seconds in which the host worked, and devices may have had nothing to do."""
        return max(self.prefill_seconds + self.decode_seconds - self.wait_seconds, 0.0)


class InFlight:
    """Keeps dispatched steps in order. A step's time runs from the end of the one before it, or from its dispatch."""

    def __init__(self) -> None:
        self._steps: collections.deque[Dispatched] = collections.deque()
        self._since = 0.0

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, step: Dispatched) -> None:
        """Adds a step that was just dispatched."""
        if not self._steps:
            self._since = time.perf_counter()
        self._steps.append(step)

    def take(self) -> tuple[Dispatched, StepOutput, float, float]:
        """Waits for the oldest step; returns it, what it gave, as NumPy arrays, its seconds, and those of the wait.

        This is the one transfer of a step to the host; log probabilities are fetched where a request wants them.
        """
        step = self._steps.popleft()
        out = step.output
        wanted = [one.request.sampling for one in step.by_row.values()]
        wants, scores = (any(getattr(one, name) is not None for one in wanted) for name in LOG_PROBS)
        values = dataclasses.replace(
            out, log_probs=out.log_probs if wants else None, prompt_log_probs=out.prompt_log_probs if scores else None
        )
        asked = time.perf_counter()
        found = jax.device_get(values)
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        return step, found, seconds, now - asked

    def clear(self) -> None:
        """Forgets all steps, when nobody waits for what they give."""
        self._steps.clear()
