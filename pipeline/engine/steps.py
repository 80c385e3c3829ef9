"""The engine's steps: prefill, plain decode and the DFLASH round, over a state of fixed shape.

Every array has one row per slot, whatever requests come and go, so nothing compiles twice. A slot without a running
request computes along and its results are ignored. Without a history, every token is the most likely one. Each function
is written for one shard of a mesh (`compiled_steps.py` runs it on all), whose slots it has. The loop is
docs/dflash.md#inference-loop.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from pipeline.dflash import acceptance, blocks
from pipeline.engine.state import EngineState, PrefillChunk, StepOutput
from pipeline.model.dflash import forward as dflash
from pipeline.model.dflash.model import DraftModel
from pipeline.model.gpt_oss import forward as gpt_oss
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.layers import kv_pages, token_rules
from pipeline.model.layers.kv_pages import PageTables
from pipeline.model.layers.token_rules import TokenHistory, TokenMasks
from pipeline.model.parallel.execution import Execution
from pipeline.model.parallel.shards import Shards


def prefill(
    target: TargetModel,
    draft: DraftModel | None,
    state: EngineState,
    chunk: PrefillChunk,
    *,
    execution: Execution,
) -> tuple[EngineState, StepOutput]:
    """Runs one chunk of R prompts into their slots' pages; prompts that end in it get their first token.

    Returns the new state and the tokens [R, 1].
    """
    rows, start, shards, counts = chunk.rows, chunk.start, execution.shards, chunk.num_tokens
    tapped = () if draft is None else draft.config.tapped_layers
    out = gpt_oss.forward(
        target,
        chunk.token_ids,
        start,
        state.cache,
        tapped,
        tables=chunk.tables,
        num_tokens=counts,
        execution=execution,
    )
    draft_cache = state.draft_cache
    assert out.cache is not None
    if draft is not None:
        assert draft_cache is not None
        positions = blocks.block_positions(start, chunk.token_ids.shape[1])
        new = dflash.context(draft, out.features, positions, shards)
        draft_cache = dflash.extend(draft_cache, new, chunk.tables.whole, start, counts, execution=execution)
    last = jnp.take_along_axis(out.hidden, (counts - 1)[:, None, None], axis=1)[:, 0]
    logits = gpt_oss.logits(target.weights, last)[:, None]
    history, log_probs, of_prompts = state.history, None, None
    if history is None:
        chosen = shards.argmax(logits)
    else:
        of_prompts = token_rules.text_log_probs(
            functools.partial(gpt_oss.logits, target.weights), out.hidden, chunk.following, chunk.scored, shards
        )
        of_rows = token_rules.rows_of(history, rows)
        masks, before = token_rules.rows_of(state.masks, rows), start + counts - 1
        chosen = token_rules.choose(logits, chunk.rules, of_rows, chunk.token_ids[:, :1], before, shards, masks)
    first = jnp.where(chunk.first_ids < 0, chosen[:, 0], chunk.first_ids)
    finished = chunk.is_last & ((first[:, None] == chunk.rules.stop_ids).any(-1) | (chunk.budget <= 1))
    num_chosen = chunk.is_last.astype(jnp.int32)
    if history is not None:
        log_probs = token_rules.log_probs(logits, first[:, None], chunk.rules, shards)
        history = token_rules.with_tokens(history, chunk.rules, first[:, None], num_chosen, shards, rows)
    state = EngineState(
        cache=out.cache,
        draft_cache=draft_cache,
        anchor=state.anchor.at[rows].set(first, mode="drop"),
        length=state.length.at[rows].set(start + counts, mode="drop"),
        remaining=state.remaining.at[rows].set(chunk.budget - 1, mode="drop"),
        active=state.active.at[rows].set(chunk.is_last & ~finished, mode="drop"),
        rules=jax.tree.map(lambda old, new: old.at[rows].set(new, mode="drop"), state.rules, chunk.rules),
        history=history,
        masks=state.masks,
        features=state.features,
        num_features=None if state.num_features is None else state.num_features.at[rows].set(0, mode="drop"),
    )
    return state, _replicate(StepOutput(first[:, None], num_chosen, finished, log_probs, of_prompts), shards)


def plain_step(
    target: TargetModel,
    draft: DraftModel | None,
    state: EngineState,
    tables: PageTables,
    *,
    execution: Execution,
) -> tuple[EngineState, StepOutput]:
    """Decodes one token for each active one of B slots. Returns the new state and the tokens [B, 1].

    Beside a draft the features are set aside, for which there must be room: `extend_context` gives those of several
    steps at once.
    """
    start = _start(state)
    tables = kv_pages.active_only(tables, state.active)
    block = state.anchor[:, None]
    tapped = () if draft is None else draft.config.tapped_layers
    out = gpt_oss.forward(target, block, start, state.cache, tapped, tables=tables, execution=execution)
    assert out.cache is not None
    state = dataclasses.replace(state, cache=out.cache)
    if draft is not None:
        assert state.features is not None
        assert state.num_features is not None
        new = out.features[:, 0].astype(state.features.dtype)
        state = dataclasses.replace(
            state,
            features=state.features.at[jnp.arange(len(start)), state.num_features].set(new, mode="drop"),
            num_features=state.num_features + state.active.astype(jnp.int32),
        )
    return _commit(state, _choice(target, state, out.hidden, block, execution.shards), None, execution.shards)


def extend_context(draft: DraftModel, state: EngineState, tables: PageTables, *, execution: Execution) -> EngineState:
    """Puts the features that plain steps set aside into the draft's cache, for every active slot."""
    assert state.features is not None
    assert state.num_features is not None
    assert state.draft_cache is not None
    count = jnp.where(state.active, state.num_features, 0)
    start = jnp.where(state.active, state.length - count, 0)
    positions = blocks.block_positions(start, state.features.shape[1])
    new = dflash.context(draft, state.features, positions, execution.shards)
    table = kv_pages.active_only(tables, state.active).whole
    draft_cache = dflash.extend(state.draft_cache, new, table, start, count, execution=execution)
    return dataclasses.replace(state, draft_cache=draft_cache, num_features=jnp.zeros_like(count))


def dflash_round(
    target: TargetModel,
    draft: DraftModel,
    state: EngineState,
    tables: PageTables,
    forced_ids: Int[Array, "B K"] | None = None,
    drafted: Int[Array, "B drafted"] | None = None,
    *,
    execution: Execution,
    block_size: int | None = None,
) -> tuple[EngineState, StepOutput]:
    """Drafts a block for each of B slots, verifies it with the target and commits the longest agreeing prefix.

    A block has `block_size` positions, None for as many as the draft was trained with.

    Both caches are written for the whole block and `length` advances by what was accepted, which drops the rest: their
    positions are written again before anything sees them. `forced_ids` are the tokens that follow each anchor in a
    known answer and stand for what the target would choose (forced_decoding.py), and `drafted` the tokens of a draft
    that has run already. Returns the new state and the tokens [B, K], of which 1..K of each row count.
    """
    assert state.draft_cache is not None
    if block_size is not None:
        draft = _with_block_size(draft, block_size)
    config, shards = draft.config, execution.shards
    tables, start = kv_pages.active_only(tables, state.active), _start(state)
    if drafted is None:
        drafted = draft_block(target, draft, state, tables.whole, execution)
    block = jnp.concatenate([state.anchor[:, None], drafted], axis=1)
    out = gpt_oss.forward(target, block, start, state.cache, config.tapped_layers, tables=tables, execution=execution)
    assert out.cache is not None
    new = dflash.context(draft, out.features, blocks.block_positions(start, config.block_size), shards)
    draft_cache = dflash.extend(state.draft_cache, new, tables.whole, start, execution=execution)
    state = dataclasses.replace(state, cache=out.cache, draft_cache=draft_cache)
    choice = _choice(target, state, out.hidden, block, shards)
    if forced_ids is not None:
        choice = choice._replace(tokens=forced_ids)
    return _commit(state, choice, acceptance.count_accepted(drafted, choice.tokens[:, :-1]) + 1, shards)


def verify_apart(
    target: TargetModel,
    draft: DraftModel,
    state: EngineState,
    tables: PageTables,
    drafted: Int[Array, "B drafted"],
    *,
    execution: Execution,
) -> tuple[EngineState, StepOutput]:
    """Does the rest of a round whose tokens, all of a block behind its anchor, are drafted already."""
    size = drafted.shape[1] + 1
    return dflash_round(target, draft, state, tables, drafted=drafted, execution=execution, block_size=size)


def draft_apart(
    target: TargetModel,
    draft: DraftModel,
    state: EngineState,
    tables: PageTables,
    *,
    execution: Execution,
    block_size: int,
) -> Int[Array, "B drafted"]:
    """Returns the tokens of all shards' drafts, for the host to read before they are verified."""
    draft = _with_block_size(draft, block_size)
    tables = kv_pages.active_only(tables, state.active)
    return execution.shards.all_rows(draft_block(target, draft, state, tables.whole, execution))


def draft_block(
    target: TargetModel,
    draft: DraftModel,
    state: EngineState,
    table: Int[Array, "B M"],
    execution: Execution,
) -> Int[Array, "B drafted"]:
    """Returns the draft's most likely tokens [B, K-1] behind each anchor, from the context in its pages before it."""
    assert state.draft_cache is not None
    config, start = draft.config, _start(state)
    ids = blocks.block_token_ids(state.anchor, config.mask_token_id, config.block_size)
    embeddings = gpt_oss.embed(target.weights, ids, execution.shards)
    hidden = dflash.denoise(draft, embeddings, start, state.draft_cache, table, execution)
    return gpt_oss.next_tokens(target.weights, hidden[:, 1:], execution.shards)


def _with_block_size(draft: DraftModel, size: int) -> DraftModel:
    return dataclasses.replace(draft, config=dataclasses.replace(draft.config, block_size=size))


class _Choice(NamedTuple):
    """Holds the tokens that the target chooses behind each of T, and its logits where requests may want them."""

    tokens: Int[Array, "B T"]
    logits: Float[Array, "B T local"] | None


def _start(state: EngineState) -> Int[Array, " B"]:
    """Returns the positions of the anchors; 0 where no request runs, so that nothing is read for it."""
    return jnp.where(state.active, state.length, 0)


def _choice(
    target: TargetModel,
    state: EngineState,
    hidden: Float[Array, "B T D"],
    block: Int[Array, "B T"],
    shards: Shards,
) -> _Choice:
    logits = gpt_oss.logits(target.weights, hidden)
    if state.history is None:
        return _Choice(shards.argmax(logits), None)
    tokens = token_rules.choose(logits, state.rules, state.history, block, _start(state), shards, state.masks)
    return _Choice(tokens, logits)


def _commit(
    state: EngineState, choice: _Choice, num_tokens: Int[Array, " B"] | None, shards: Shards
) -> tuple[EngineState, StepOutput]:
    """Commits the first `num_tokens` (None: 1) of each active row, cut at a stop token or at the row's budget."""
    tokens, rules = choice.tokens, state.rules
    allowed = jnp.minimum(1 if num_tokens is None else num_tokens, state.remaining)
    counted, stopped = acceptance.cut_at_stop(tokens, allowed, rules.stop_ids)
    counted = jnp.where(state.active, counted, 0)
    remaining = state.remaining - counted
    finished = state.active & (stopped | (remaining <= 0))
    last = jnp.take_along_axis(tokens, jnp.maximum(counted - 1, 0)[:, None], axis=1)[:, 0]
    history, log_probs = state.history, None
    if history is not None:
        history = token_rules.with_tokens(history, rules, tokens, counted, shards)
    if choice.logits is not None:
        log_probs = token_rules.log_probs(choice.logits, tokens, rules, shards)
    new = dataclasses.replace(
        state,
        anchor=jnp.where(state.active, last, state.anchor),
        length=state.length + counted,
        remaining=remaining,
        active=state.active & ~finished,
        history=history,
    )
    return new, _replicate(StepOutput(tokens, counted, finished, log_probs), shards)


def set_history(
    state: EngineState, rows: Int[Array, " R"], generated: Int[Array, "R local"], in_prompt: Bool[Array, "R local"]
) -> EngineState:
    """Sets what slots have written so far, before their anchor, and which tokens their prompts have."""
    assert state.history is not None
    history = TokenHistory(
        state.history.generated.at[rows].set(generated, mode="drop"),
        state.history.in_prompt.at[rows].set(in_prompt, mode="drop"),
    )
    return dataclasses.replace(state, history=history)


def set_masks(state: EngineState, words: UInt32[Array, "B K words"], is_masked: Bool[Array, " B"]) -> EngineState:
    """Sets which tokens may follow in the next step."""
    return dataclasses.replace(state, masks=TokenMasks(words, is_masked))


def _replicate(output: StepOutput, shards: Shards) -> StepOutput:
    """Returns the rows of all shards, for every host reads them."""
    return jax.tree.map(shards.all_rows, output)
