"""The sizes of an engine."""

import dataclasses

from pipeline.errors import PipelineError
from pipeline.model.layers.token_rules import MAX_STOPS


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Holds the sizes of an engine. Raises PipelineError on values that are out of range.

    `max_length` bounds the prompt plus the generated tokens of a request; prompts run in chunks of `prefill_chunk`
    tokens, of which a step runs `step_tokens` in all (None: 8 chunks) beside the round of the running requests. Keys
    and values of `cache_tokens` tokens are held (None: see `layout.cache_tokens`), in pages of `page_size`; requests
    that begin with the same tokens share them when `reuse_prefixes` is set. With a draft, each round's block has the
    one of `block_sizes` that pays most, of which 1 is plain decoding (none: always the draft's own). A step computes
    all slots, or where few of them decode, the least of `row_counts` that holds these. A generation ends with a token
    of `stop_token_ids` (included in the answer), unless its request has others, or at its length. Unless
    `samples` is set, every token is the most likely one, and requests that ask for another choice or for log
    probabilities are refused: programs without them compile in half the time.
    """

    num_slots: int
    max_length: int
    prefill_chunk: int
    page_size: int = 32
    cache_tokens: int | None = None
    step_tokens: int | None = None
    reuse_prefixes: bool = False
    block_sizes: tuple[int, ...] = ()
    row_counts: tuple[int, ...] = ()
    samples: bool = False
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Checks the values."""
        sizes = {
            "num_slots": self.num_slots,
            "max_length": self.max_length,
            "prefill_chunk": self.prefill_chunk,
            "page_size": self.page_size,
            "cache_tokens": self.cache_tokens,
            "step_tokens": self.step_tokens,
        }
        wrong = [
            f"{name} is {value}; it must be positive"
            for name, value in sizes.items()
            if value is not None and value < 1
        ]
        if len(self.stop_token_ids) > MAX_STOPS:
            wrong.append(f"there are {len(self.stop_token_ids)} stop tokens; there may be {MAX_STOPS}")
        if wrong:
            raise PipelineError("the engine: " + "\n  ".join(wrong))
