"""The sizes of an engine, and how it chooses tokens."""

import dataclasses

from pipeline.errors import PipelineError
from pipeline.model.layers.sampling import Sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Holds the sizes of an engine and how it chooses tokens. Raises PipelineError on values that are out of range.

    `max_length` bounds the prompt plus the generated tokens of a request; prompts run in chunks of `prefill_chunk`
    tokens. A generation ends with a token of `stop_token_ids` (included in the answer) or at its length. Without
    `sampling`, tokens are the most likely ones; with it they are drawn, and depend on a request's key and prompt alone.
    """

    num_slots: int
    max_length: int
    prefill_chunk: int
    stop_token_ids: tuple[int, ...] = ()
    sampling: Sampling | None = None

    def __post_init__(self) -> None:
        """Checks the values."""
        sizes = {"num_slots": self.num_slots, "max_length": self.max_length, "prefill_chunk": self.prefill_chunk}
        wrong = [f"{name} is {value}; it must be positive" for name, value in sizes.items() if value < 1]
        sampling = self.sampling
        if sampling is not None and not (sampling.temperature > 0 and 0 < sampling.top_p <= 1):
            wrong.append(f"{sampling}; temperature must be positive, top_p above 0 and at most 1")
        if wrong:
            raise PipelineError("the engine: " + "\n  ".join(wrong))
