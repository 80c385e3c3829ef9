"""The runtime's compiled steps: prefill, plain decode and the DFLASH round, over a state of fixed shape.

Every array has one row per slot, whatever requests come and go, so nothing compiles twice. A slot without
a running request computes along and its results are ignored. Loop: ../shared/reference/dflash.md 3.1.
"""

import dataclasses
from functools import partial
from typing import no_type_check

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int

from pipeline.dflash import acceptance, blocks
from pipeline.model import draft as draft_model
from pipeline.model import gpt_oss, kv_cache
from pipeline.model.draft import DraftConfig, DraftWeights
from pipeline.model.gpt_oss import GptOssConfig, GptOssWeights
from pipeline.model.kv_cache import KVCache


@no_type_check  # JAX rebuilds it around shapes, masks and gradients too
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What the device holds between steps.

    `length` counts a slot's committed positions; `anchor` is the token at that position, certain but not
    yet in any cache; `remaining` is how many more tokens the request may yield.
    """

    cache: KVCache
    draft_cache: KVCache | None
    anchor: Int[Array, " B"]
    length: Int[Array, " B"]
    remaining: Int[Array, " B"]
    active: Bool[Array, " B"]


@no_type_check  # JAX rebuilds it around shapes, masks and gradients too
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Yield:
    """What a step gives the host: tokens [B, K], how many of each row count, and which rows are done."""

    token_ids: Int[Array, "B K"]
    num_tokens: Int[Array, " B"]
    finished: Bool[Array, " B"]


def empty_state(
    config: GptOssConfig, draft: DraftConfig | None, slots: int, num_positions: int, dtype: DTypeLike
) -> State:
    """All slots free. `num_positions` must leave room for one chunk or block past the longest sequence."""
    zeros = [jnp.zeros(slots, jnp.int32) for _ in range(3)]  # one array each: donated buffers must differ
    return State(
        cache=gpt_oss.empty_cache(config, slots, num_positions, dtype),
        draft_cache=None if draft is None else draft_model.empty_cache(draft, slots, num_positions, dtype),
        anchor=zeros[0],
        length=zeros[1],
        remaining=zeros[2],
        active=jnp.zeros(slots, bool),
    )


@partial(jax.jit, static_argnames=("config", "draft_config"), donate_argnames=("state",))
def prefill(
    weights: GptOssWeights,
    draft_weights: DraftWeights | None,
    state: State,
    rows: Int[Array, " R"],
    token_ids: Int[Array, "R C"],
    start: Int[Array, " R"],
    num_tokens: Int[Array, " R"],
    budget: Int[Array, " R"],
    is_last: Bool[Array, " R"],
    stop_ids: Int[Array, " stops"],
    *,
    config: GptOssConfig,
    draft_config: DraftConfig | None,
) -> tuple[State, Yield]:
    """Run one chunk of R prompts, the first `num_tokens` of its C columns real, into the slots `rows`.

    `is_last` marks prompts that end here: they yield their first token and start decoding with `budget`
    tokens to give. Places not needed carry a row number past the last slot.
    """
    tapped = () if draft_config is None else draft_config.tapped_layers
    part = kv_cache.take_rows(state.cache, rows)
    out = gpt_oss.forward(weights, config, token_ids, start, part, tapped)
    cache = kv_cache.put_rows(state.cache, rows, out.cache)
    draft_cache = state.draft_cache
    if draft_config is not None:
        new = draft_model.context(
            draft_weights, draft_config, out.features, blocks.block_positions(start, token_ids.shape[1])
        )
        part = draft_model.extend(kv_cache.take_rows(draft_cache, rows), new, start)
        draft_cache = kv_cache.put_rows(draft_cache, rows, part)
    last = jnp.take_along_axis(out.hidden, (num_tokens - 1)[:, None, None], axis=1)[:, 0]
    first = jnp.argmax(gpt_oss.logits(weights, last), axis=-1).astype(jnp.int32)
    finished = is_last & ((first[:, None] == stop_ids).any(-1) | (budget <= 1))
    state = State(
        cache=cache,
        draft_cache=draft_cache,
        anchor=state.anchor.at[rows].set(first, mode="drop"),
        length=state.length.at[rows].set(start + num_tokens, mode="drop"),
        remaining=state.remaining.at[rows].set(budget - 1, mode="drop"),
        active=state.active.at[rows].set(is_last & ~finished, mode="drop"),
    )
    return state, Yield(first[:, None], is_last.astype(jnp.int32), finished)


@partial(jax.jit, static_argnames=("config",), donate_argnames=("state",))
def plain_step(
    weights: GptOssWeights, state: State, stop_ids: Int[Array, " stops"], *, config: GptOssConfig
) -> tuple[State, Yield]:
    """One token for every active slot."""
    out = gpt_oss.forward(weights, config, state.anchor[:, None], state.length, state.cache)
    tokens = jnp.argmax(gpt_oss.logits(weights, out.hidden), axis=-1).astype(jnp.int32)
    return _commit(state, tokens, jnp.ones_like(state.length), stop_ids, out.cache, state.draft_cache)


@partial(jax.jit, static_argnames=("config", "draft_config"), donate_argnames=("state",))
def dflash_round(
    weights: GptOssWeights,
    draft_weights: DraftWeights,
    state: State,
    stop_ids: Int[Array, " stops"],
    *,
    config: GptOssConfig,
    draft_config: DraftConfig,
) -> tuple[State, Yield]:
    """Draft a block, verify it with the target, keep the longest agreeing prefix, commit it: 1..K tokens.

    Both caches are written for the whole block and `length` advances by what was kept, which drops the
    rest: their slots are written again before anything sees them.
    """
    positions = blocks.block_positions(state.length, draft_config.block_size)
    proposed = propose(weights, draft_weights, draft_config, state.anchor, state.length, state.draft_cache)
    block = jnp.concatenate([state.anchor[:, None], proposed], axis=1)
    out = gpt_oss.forward(weights, config, block, state.length, state.cache, draft_config.tapped_layers)
    verified = jnp.argmax(gpt_oss.logits(weights, out.hidden), axis=-1).astype(jnp.int32)
    kept = acceptance.count_kept(proposed, verified[:, :-1])
    new = draft_model.context(draft_weights, draft_config, out.features, positions)
    draft_cache = draft_model.extend(state.draft_cache, new, state.length)
    return _commit(state, verified, kept + 1, stop_ids, out.cache, draft_cache)


def propose(
    weights: GptOssWeights,
    draft_weights: DraftWeights,
    config: DraftConfig,
    anchor: Int[Array, " B"],
    length: Int[Array, " B"],
    draft_cache: KVCache,
) -> Int[Array, "B drafted"]:
    """The draft's K-1 tokens behind each anchor, from the context committed before it."""
    ids = blocks.block_token_ids(anchor, config.mask_token_id, config.block_size)
    hidden = draft_model.denoise(
        draft_weights,
        config,
        weights.embedding[ids][:, None],
        blocks.block_positions(length, config.block_size)[:, None],
        draft_cache,
        blocks.context_visible(length[:, None], draft_cache.num_positions),
    )
    return jnp.argmax(gpt_oss.logits(weights, hidden[:, 0, 1:]), axis=-1).astype(jnp.int32)


def _commit(
    state: State,
    tokens: Int[Array, "B K"],
    num_tokens: Int[Array, " B"],
    stop_ids: Int[Array, " stops"],
    cache: KVCache,
    draft_cache: KVCache | None,
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
    )
    return new, Yield(tokens, counted, finished)
