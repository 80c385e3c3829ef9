"""The engine's steps: prefill, plain decode and the DFLASH round, over a state of fixed shape.

Every array has one row per slot, whatever requests come and go, so nothing compiles twice. A slot without a running
request computes along and its results are ignored. Each function is written for one shard of a mesh
(`compiled_steps.py` runs it on all), whose slots it has. The loop is docs/dflash.md#inference-loop.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from pipeline.dflash import acceptance, blocks
from pipeline.engine.state import EngineState, PrefillChunk, StepOutput
from pipeline.model.dflash import forward as dflash
from pipeline.model.dflash.model import DraftModel
from pipeline.model.gpt_oss import forward as gpt_oss
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.gpt_oss.weights import GptOssWeights
from pipeline.model.layers import sampling as sampling_layer
from pipeline.model.layers.kv_cache import KVCache
from pipeline.model.layers.sampling import Sampling
from pipeline.model.parallel.execution import Execution
from pipeline.model.parallel.shards import Shards


def prefill(
    target: TargetModel,
    draft: DraftModel | None,
    state: EngineState,
    chunk: PrefillChunk,
    stop_ids: Int[Array, " stops"],
    *,
    execution: Execution,
    sampling: Sampling | None = None,
) -> tuple[EngineState, StepOutput]:
    """Runs one chunk of R prompts into their slots; prompts that end in it get their first token.

    Returns the new state and the tokens [R, 1].
    """
    rows, start, shards = chunk.rows, chunk.start, execution.shards
    tapped = () if draft is None else draft.config.tapped_layers
    out = gpt_oss.forward(
        target,
        chunk.token_ids,
        start,
        state.cache,
        tapped,
        rows=rows,
        num_tokens=chunk.num_tokens,
        execution=execution,
    )
    draft_cache = state.draft_cache
    assert out.cache is not None
    if draft is not None:
        assert draft_cache is not None
        positions = blocks.block_positions(start, chunk.token_ids.shape[1])
        new = dflash.context(draft, out.features, positions, shards)
        draft_cache = dflash.extend(draft_cache, new, start, rows)
    last = jnp.take_along_axis(out.hidden, (chunk.num_tokens - 1)[:, None, None], axis=1)[:, 0]
    first = _next_tokens(target.weights, last, start + chunk.num_tokens, chunk.keys, sampling, shards)
    finished = chunk.is_last & ((first[:, None] == stop_ids).any(-1) | (chunk.budget <= 1))
    state = EngineState(
        cache=out.cache,
        draft_cache=draft_cache,
        anchor=state.anchor.at[rows].set(first, mode="drop"),
        length=state.length.at[rows].set(start + chunk.num_tokens, mode="drop"),
        remaining=state.remaining.at[rows].set(chunk.budget - 1, mode="drop"),
        active=state.active.at[rows].set(chunk.is_last & ~finished, mode="drop"),
        keys=None if state.keys is None else state.keys.at[rows].set(chunk.keys, mode="drop"),
    )
    return state, _replicate(StepOutput(first[:, None], chunk.is_last.astype(jnp.int32), finished), shards)


def plain_step(
    target: TargetModel,
    state: EngineState,
    stop_ids: Int[Array, " stops"],
    *,
    execution: Execution,
    sampling: Sampling | None = None,
) -> tuple[EngineState, StepOutput]:
    """Decodes one token for each active one of B slots: the most likely one, or one drawn as `sampling` says.

    Returns the new state and the tokens [B, 1].
    """
    shards = execution.shards
    out = gpt_oss.forward(target, state.anchor[:, None], state.length, state.cache, execution=execution)
    assert out.cache is not None
    tokens = _next_tokens(target.weights, out.hidden, state.length + 1, state.keys, sampling, shards)
    num_tokens = jnp.ones_like(state.length)
    return _commit(state, tokens, num_tokens, stop_ids, (out.cache, state.draft_cache), shards)


def dflash_round(
    target: TargetModel,
    draft: DraftModel,
    state: EngineState,
    stop_ids: Int[Array, " stops"],
    forced_ids: Int[Array, "B K"] | None = None,
    *,
    execution: Execution,
) -> tuple[EngineState, StepOutput]:
    """Drafts a block for each of B slots, verifies it with the target and commits the longest agreeing prefix.

    Both caches are written for the whole block and `length` advances by what was accepted, which drops the rest: their
    positions are written again before anything sees them. `forced_ids` are the tokens that follow each anchor in a
    known answer and stand for what the target would choose (forced_decoding.py). Returns the new state and the tokens
    [B, K], of which 1..K of each row count.
    """
    assert state.draft_cache is not None
    config, shards = draft.config, execution.shards
    positions = blocks.block_positions(state.length, config.block_size)
    drafted = draft_block(target, draft, state.anchor, state.length, state.draft_cache, execution)
    block = jnp.concatenate([state.anchor[:, None], drafted], axis=1)
    out = gpt_oss.forward(target, block, state.length, state.cache, config.tapped_layers, execution=execution)
    assert out.cache is not None
    chosen = gpt_oss.next_tokens(target.weights, out.hidden, shards) if forced_ids is None else forced_ids
    num_accepted = acceptance.count_accepted(drafted, chosen[:, :-1])
    new = dflash.context(draft, out.features, positions, shards)
    draft_cache = dflash.extend(state.draft_cache, new, state.length)
    return _commit(state, chosen, num_accepted + 1, stop_ids, (out.cache, draft_cache), shards)


def draft_block(
    target: TargetModel,
    draft: DraftModel,
    anchor: Int[Array, " B"],
    length: Int[Array, " B"],
    draft_cache: KVCache,
    execution: Execution,
) -> Int[Array, "B drafted"]:
    """Returns the draft's tokens [B, K-1] behind each anchor, from the context committed before it."""
    config = draft.config
    ids = blocks.block_token_ids(anchor, config.mask_token_id, config.block_size)
    embeddings = gpt_oss.embed(target.weights, ids, execution.shards)
    hidden = dflash.denoise(draft, embeddings, length, draft_cache, execution)
    return gpt_oss.next_tokens(target.weights, hidden[:, 1:], execution.shards)


def _next_tokens(
    weights: GptOssWeights,
    hidden: Float[Array, "*rows D"],
    positions: Int[Array, " B"],
    keys: UInt32[Array, "B two"] | None,
    sampling: Sampling | None,
    shards: Shards,
) -> Int[Array, "*rows"]:
    """Returns one token for each row, the most likely one or a drawn one."""
    if sampling is None:
        return gpt_oss.next_tokens(weights, hidden, shards)
    assert keys is not None
    logits = gpt_oss.logits(weights, hidden).reshape(len(hidden), -1)
    return sampling_layer.sample(logits, keys, positions, sampling, shards).reshape(hidden.shape[:-1])


def _commit(
    state: EngineState,
    tokens: Int[Array, "B K"],
    num_tokens: Int[Array, " B"],
    stop_ids: Int[Array, " stops"],
    caches: tuple[KVCache, KVCache | None],
    shards: Shards,
) -> tuple[EngineState, StepOutput]:
    """Commits the first `num_tokens` of each active row, cut at a stop token or at the row's budget."""
    allowed = jnp.minimum(num_tokens, state.remaining)
    counted, stopped = acceptance.cut_at_stop(tokens, allowed, stop_ids)
    counted = jnp.where(state.active, counted, 0)
    remaining = state.remaining - counted
    finished = state.active & (stopped | (remaining <= 0))
    last = jnp.take_along_axis(tokens, jnp.maximum(counted - 1, 0)[:, None], axis=1)[:, 0]
    new = EngineState(
        cache=caches[0],
        draft_cache=caches[1],
        anchor=jnp.where(state.active, last, state.anchor),
        length=state.length + counted,
        remaining=remaining,
        active=state.active & ~finished,
        keys=state.keys,
    )
    return new, _replicate(StepOutput(tokens, counted, finished), shards)


def _replicate(output: StepOutput, shards: Shards) -> StepOutput:
    """Returns the rows of all shards, for every host reads them."""
    return jax.tree.map(shards.all_rows, output)
