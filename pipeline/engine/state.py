"""The arrays of the engine's steps: its state between them, a chunk of prompts to prefill, and a step's output."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt32

from pipeline.engine.config import EngineConfig
from pipeline.engine.layout import num_positions
from pipeline.model.dflash import forward as dflash
from pipeline.model.dflash.model import DraftModel
from pipeline.model.gpt_oss import forward as gpt_oss
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.layers.kv_cache import KVCache
from pipeline.model.layers.pytree import pytree_dataclass


@pytree_dataclass()
class EngineState:
    """Holds what the device keeps between steps, for B slots.

    `length` counts a slot's committed positions; `anchor` is the token at that position, certain but not yet in any
    cache; `remaining` is how many more tokens the request may get; `keys` are the sampling keys of the requests, None
    where decoding is greedy.
    """

    cache: KVCache
    draft_cache: KVCache | None
    anchor: Int[Array, " B"]
    length: Int[Array, " B"]
    remaining: Int[Array, " B"]
    active: Bool[Array, " B"]
    keys: UInt32[Array, "B two"] | None = None


@pytree_dataclass()
class PrefillChunk:
    """Holds C columns of R prompts, of which the first `num_tokens` are real, for the slots `rows`.

    `start` is the position of the first column. `is_last` marks prompts that end in this chunk: they get their first
    token and start decoding with a `budget` of tokens. Rows that are not needed carry a number past the shard's last
    slot.
    """

    rows: Int[Array, " R"]
    token_ids: Int[Array, "R C"]
    start: Int[Array, " R"]
    num_tokens: Int[Array, " R"]
    budget: Int[Array, " R"]
    is_last: Bool[Array, " R"]
    keys: UInt32[Array, "R two"] | None = None


@pytree_dataclass()
class StepOutput:
    """Holds what a step returns to the host: tokens, how many of each row count, and which rows are finished."""

    token_ids: Int[Array, "B K"]
    num_tokens: Int[Array, " B"]
    finished: Bool[Array, " B"]


def empty_state(target: TargetModel, draft: DraftModel | None, config: EngineConfig) -> EngineState:
    """Returns the state with all slots free; of the models' weights only the precision matters."""
    slots, dtype = config.num_slots, target.weights.embedding.dtype
    block_size = 1 if draft is None else draft.config.block_size
    positions = num_positions(config.max_length, config.prefill_chunk, block_size)
    zeros = [jnp.zeros(slots, jnp.int32) for _ in range(3)]  # one array each: donated buffers must differ
    return EngineState(
        cache=gpt_oss.empty_cache(target.config, slots, positions, dtype, rollback=block_size),
        draft_cache=None if draft is None else dflash.empty_cache(draft.config, slots, positions, dtype),
        anchor=zeros[0],
        length=zeros[1],
        remaining=zeros[2],
        active=jnp.zeros(slots, bool),
        keys=None if config.sampling is None else jnp.zeros((slots, 2), jnp.uint32),
    )
