"""The runtime's steps: prefill, plain decode and the DFLASH round, over a state of fixed shape.

Every array has one row per slot, whatever requests come and go, so nothing compiles twice. A slot without
a running request computes along and its results are ignored. Each function is written for one shard of a mesh
(`compiled.py` runs it on all), whose slots it has. Loop: ../shared/reference/dflash.md 3.1.
"""

import dataclasses
from typing import no_type_check

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt32

from pipeline.dflash import acceptance, blocks
from pipeline.model import draft as draft_model
from pipeline.model import gpt_oss, sampling
from pipeline.model.draft import DraftConfig, DraftWeights
from pipeline.model.execution import Execution
from pipeline.model.gpt_oss_config import GptOssConfig
from pipeline.model.gpt_oss_weights import GptOssWeights
from pipeline.model.kv_cache import KVCache
from pipeline.model.sampling import Sampling
from pipeline.model.sharding import Shards


@no_type_check  # JAX rebuilds it around shapes, masks and gradients too
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What the device holds between steps.

    `length` counts a slot's committed positions; `anchor` is the token at that position, certain but not
    yet in any cache; `remaining` is how many more tokens the request may yield; `keys` are those of the requests
    where tokens are sampled, None where decoding is greedy.
    """

    cache: KVCache
    draft_cache: KVCache | None
    anchor: Int[Array, " B"]
    length: Int[Array, " B"]
    remaining: Int[Array, " B"]
    active: Bool[Array, " B"]
    keys: UInt32[Array, "B two"] | None = None


@no_type_check  # JAX rebuilds it around shapes, masks and gradients too
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
    """A chunk of R prompts, the first `num_tokens` of its C columns real, for the slots `rows`.

    `is_last` marks prompts that end here: they yield their first token and start decoding with `budget`
    tokens to give. Places not needed carry a row number past the shard's last slot.
    """

    rows: Int[Array, " R"]
    token_ids: Int[Array, "R C"]
    start: Int[Array, " R"]
    num_tokens: Int[Array, " R"]
    budget: Int[Array, " R"]
    is_last: Bool[Array, " R"]
    keys: UInt32[Array, "R two"] | None = None


@no_type_check  # JAX rebuilds it around shapes, masks and gradients too
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Yield:
    """What a step gives the host: tokens [B, K], how many of each row count, and which rows are done."""

    token_ids: Int[Array, "B K"]
    num_tokens: Int[Array, " B"]
    finished: Bool[Array, " B"]


def empty_state(
    config: GptOssConfig,
    draft: DraftConfig | None,
    slots: int,
    num_positions: int,
    dtype: DTypeLike,
    how: Sampling | None = None,
) -> State:
    """All slots free. `num_positions` must leave room for one chunk or block past the longest sequence."""
    zeros = [jnp.zeros(slots, jnp.int32) for _ in range(3)]  # one array each: donated buffers must differ
    block = 1 if draft is None else draft.block_size
    return State(
        cache=gpt_oss.empty_cache(config, slots, num_positions, dtype, rollback=block),
        draft_cache=None if draft is None else draft_model.empty_cache(draft, slots, num_positions, dtype),
        anchor=zeros[0],
        length=zeros[1],
        remaining=zeros[2],
        active=jnp.zeros(slots, bool),
        keys=None if how is None else jnp.zeros((slots, 2), jnp.uint32),
    )


def prefill(
    weights: GptOssWeights,
    draft_weights: DraftWeights | None,
    state: State,
    chunk: Chunk,
    stop_ids: Int[Array, " stops"],
    *,
    config: GptOssConfig,
    draft_config: DraftConfig | None,
    run: Execution,
    how: Sampling | None = None,
) -> tuple[State, Yield]:
    """Run one chunk of prompts into their slots."""
    rows, start = chunk.rows, chunk.start
    tapped = () if draft_config is None else draft_config.tapped_layers
    out = gpt_oss.forward(
        weights, config, chunk.token_ids, start, state.cache, tapped, rows=rows, num_tokens=chunk.num_tokens, run=run
    )
    draft_cache = state.draft_cache
    if draft_config is not None:
        positions = blocks.block_positions(start, chunk.token_ids.shape[1])
        new = draft_model.context(draft_weights, draft_config, out.features, positions, run.shards)
        draft_cache = draft_model.extend(draft_cache, new, start, rows)
    last = jnp.take_along_axis(out.hidden, (chunk.num_tokens - 1)[:, None, None], axis=1)[:, 0]
    first = _next_tokens(weights, last, start + chunk.num_tokens, chunk.keys, how, run.shards)
    finished = chunk.is_last & ((first[:, None] == stop_ids).any(-1) | (chunk.budget <= 1))
    state = State(
        cache=out.cache,
        draft_cache=draft_cache,
        anchor=state.anchor.at[rows].set(first, mode="drop"),
        length=state.length.at[rows].set(start + chunk.num_tokens, mode="drop"),
        remaining=state.remaining.at[rows].set(chunk.budget - 1, mode="drop"),
        active=state.active.at[rows].set(chunk.is_last & ~finished, mode="drop"),
        keys=None if how is None else state.keys.at[rows].set(chunk.keys, mode="drop"),
    )
    return state, _told(Yield(first[:, None], chunk.is_last.astype(jnp.int32), finished), run.shards)


def plain_step(
    weights: GptOssWeights,
    state: State,
    stop_ids: Int[Array, " stops"],
    *,
    config: GptOssConfig,
    run: Execution,
    how: Sampling | None = None,
) -> tuple[State, Yield]:
    """One token for every active slot: the most likely, or one drawn as `how` tells."""
    out = gpt_oss.forward(weights, config, state.anchor[:, None], state.length, state.cache, run=run)
    tokens = _next_tokens(weights, out.hidden, state.length + 1, state.keys, how, run.shards)
    num_tokens = jnp.ones_like(state.length)
    return _commit(state, tokens, num_tokens, stop_ids, out.cache, state.draft_cache, run.shards)


def dflash_round(
    weights: GptOssWeights,
    draft_weights: DraftWeights,
    state: State,
    stop_ids: Int[Array, " stops"],
    answer: Int[Array, "B K"] | None = None,
    *,
    config: GptOssConfig,
    draft_config: DraftConfig,
    run: Execution,
) -> tuple[State, Yield]:
    """Draft a block, verify it with the target, keep the longest agreeing prefix, commit it: 1..K tokens.

    Both caches are written for the whole block and `length` advances by what was kept, which drops the
    rest: their slots are written again before anything sees them. `answer` are the tokens that follow each
    anchor in a text that is known: given, they stand for what the target would choose (replay.py).
    """
    positions = blocks.block_positions(state.length, draft_config.block_size)
    proposed = propose(weights, draft_weights, draft_config, state.anchor, state.length, state.draft_cache, run)
    block = jnp.concatenate([state.anchor[:, None], proposed], axis=1)
    out = gpt_oss.forward(weights, config, block, state.length, state.cache, draft_config.tapped_layers, run=run)
    verified = gpt_oss.next_tokens(weights, out.hidden, run.shards) if answer is None else answer
    kept = acceptance.count_kept(proposed, verified[:, :-1])
    new = draft_model.context(draft_weights, draft_config, out.features, positions, run.shards)
    draft_cache = draft_model.extend(state.draft_cache, new, state.length)
    return _commit(state, verified, kept + 1, stop_ids, out.cache, draft_cache, run.shards)


def propose(
    weights: GptOssWeights,
    draft_weights: DraftWeights,
    config: DraftConfig,
    anchor: Int[Array, " B"],
    length: Int[Array, " B"],
    draft_cache: KVCache,
    run: Execution,
) -> Int[Array, "B drafted"]:
    """The draft's K-1 tokens behind each anchor, from the context committed before it."""
    ids = blocks.block_token_ids(anchor, config.mask_token_id, config.block_size)
    embeddings = gpt_oss.embed(weights, ids, run.shards)
    hidden = draft_model.denoise(draft_weights, config, embeddings, length, draft_cache, run)
    return gpt_oss.next_tokens(weights, hidden[:, 1:], run.shards)


def _next_tokens(
    weights: GptOssWeights,
    hidden: Float[Array, "B *one D"],
    positions: Int[Array, " B"],
    keys: UInt32[Array, "B two"] | None,
    how: Sampling | None,
    shards: Shards,
) -> Int[Array, "B *one"]:
    """One token for each row, the most likely or one drawn."""
    if how is None:
        return gpt_oss.next_tokens(weights, hidden, shards)
    logits = gpt_oss.logits(weights, hidden).reshape(len(hidden), -1)
    return sampling.sample(logits, keys, positions, how, shards).reshape(hidden.shape[:-1])


def _commit(
    state: State,
    tokens: Int[Array, "B K"],
    num_tokens: Int[Array, " B"],
    stop_ids: Int[Array, " stops"],
    cache: KVCache,
    draft_cache: KVCache | None,
    shards: Shards,
) -> tuple[State, Yield]:
    """Take the first `num_tokens` of each active row, ended at a stop token or at the row's budget."""
    allowed = jnp.minimum(num_tokens, state.remaining)
    counted, stopped = acceptance.cut_at_stop(tokens, allowed, stop_ids)
    counted = jnp.where(state.active, counted, 0)
    remaining = state.remaining - counted
    finished = state.active & (stopped | (remaining <= 0))
    last = jnp.take_along_axis(tokens, jnp.maximum(counted - 1, 0)[:, None], axis=1)[:, 0]
    new = State(
        cache=cache,
        draft_cache=draft_cache,
        anchor=jnp.where(state.active, last, state.anchor),
        length=state.length + counted,
        remaining=remaining,
        active=state.active & ~finished,
        keys=state.keys,
    )
    return new, _told(Yield(tokens, counted, finished), shards)


def _told(given: Yield, shards: Shards) -> Yield:
    """The rows of all shards, which every host reads."""
    return jax.tree.map(shards.all_rows, given)
