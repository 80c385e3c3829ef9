"""The arrays of the engine's steps: its state between them, a chunk of prompts to prefill, and a step's output."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pipeline import distributed
from pipeline.engine.config import EngineConfig
from pipeline.engine.layout import PageLayout, page_layout
from pipeline.errors import PipelineError
from pipeline.model.dflash import forward as dflash
from pipeline.model.dflash.model import DraftModel
from pipeline.model.gpt_oss import forward as gpt_oss
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.layers.kv_pages import PagedCache, PageTables
from pipeline.model.layers.pytree import pytree_dataclass
from pipeline.model.layers.token_rules import LogProbs, TokenHistory, TokenMasks, TokenRules, greedy_rules, no_masks

DEFERRED_STEPS = 16  # plain steps whose features go to the draft's cache together: its weights are read once for them


@pytree_dataclass()
class EngineState:
    """Holds what the device keeps between steps, for B slots.

    `length` counts a slot's committed positions; `anchor` is the token at that position, certain but not yet in any
    cache; `remaining` is how many more tokens the request may get; `rules` say how each request chooses its tokens, and
    `history` has what they are penalised for and `masks` which tokens may follow in the next step; both are None where
    every token is the most likely one. `features` are those of
    the last `num_features` committed positions, which are not in the draft's cache yet; None where every step puts
    them there.
    """

    cache: PagedCache
    draft_cache: PagedCache | None
    anchor: Int[Array, " B"]
    length: Int[Array, " B"]
    remaining: Int[Array, " B"]
    active: Bool[Array, " B"]
    rules: TokenRules
    history: TokenHistory | None
    masks: TokenMasks | None
    features: Float[Array, "B F LD"] | None = None
    num_features: Int[Array, " B"] | None = None


@pytree_dataclass()
class PrefillChunk:
    """Holds C columns of R prompts, of which the first `num_tokens` are real, for the slots `rows`, and their pages.

    `start` is the position of the first column. `is_last` marks prompts that end in this chunk: they start decoding
    with a `budget` of tokens, from the token `first_ids`, which is certain, or where that is negative from the
    target's own. Rows that are not needed carry a number past the shard's last slot, and have no pages. `following` are
    the prompts' tokens behind those of the chunk, whose log probabilities are wanted in rows that are `scored`.
    """

    rows: Int[Array, " R"]
    token_ids: Int[Array, "R C"]
    start: Int[Array, " R"]
    num_tokens: Int[Array, " R"]
    budget: Int[Array, " R"]
    is_last: Bool[Array, " R"]
    first_ids: Int[Array, " R"]
    following: Int[Array, "R C"]
    scored: Bool[Array, " R"]
    tables: PageTables
    rules: TokenRules


@pytree_dataclass()
class StepOutput:
    """Holds what a step returns to the host: tokens, how many of each row count, which rows are finished.

    `log_probs`, and of prefill those of the prompts' tokens behind each column, are None where no request may ask for
    them.
    """

    token_ids: Int[Array, "B K"]
    num_tokens: Int[Array, " B"]
    finished: Bool[Array, " B"]
    log_probs: LogProbs | None
    prompt_log_probs: LogProbs | None = None


def empty_state(
    target: TargetModel, draft: DraftModel | None, config: EngineConfig, num_shards: int = 1
) -> EngineState:
    """Returns the state with all slots free; of the models' weights only the precision matters."""
    slots, dtype = config.num_slots, target.weights.embedding.dtype
    layout = layout_of(target, draft, config, num_shards)
    spare = num_shards - 1  # each shard has a spare page behind its own
    num_pages, num_sliding = layout.num_pages * num_shards + spare, layout.num_sliding_pages * num_shards + spare
    history, masks = None, None
    if config.samples:
        masks = no_masks(slots, 1 if draft is None else draft.config.block_size, target.config.vocab_size)
        seen = (slots, target.config.vocab_size)
        history = TokenHistory(jnp.zeros(seen, jnp.int32), jnp.zeros(seen, bool))
    features = None
    if draft is not None and 1 in block_sizes_of(draft, config):
        features = jnp.zeros((slots, DEFERRED_STEPS, draft.config.feature_size), dtype)
    zeros = [jnp.zeros(slots, jnp.int32) for _ in range(3)]  # one array each: donated buffers must differ
    return EngineState(
        cache=gpt_oss.empty_cache(target.config, num_pages, num_sliding, layout.page_size, dtype),
        draft_cache=None if draft is None else dflash.empty_cache(draft.config, num_pages, layout.page_size, dtype),
        anchor=zeros[0],
        length=zeros[1],
        remaining=zeros[2],
        active=jnp.zeros(slots, bool),
        rules=greedy_rules(slots),
        history=history,
        masks=masks,
        features=features,
        num_features=None if features is None else jnp.zeros(slots, jnp.int32),
    )


def layout_of(target: TargetModel, draft: DraftModel | None, config: EngineConfig, num_shards: int) -> PageLayout:
    """Returns the pages of each shard of an engine."""
    window = target.config.sliding_window if any(target.config.sliding) else None
    return page_layout(config, window, 1 if draft is None else draft.config.block_size, num_shards)


def block_sizes_of(draft: DraftModel | None, config: EngineConfig) -> tuple[int, ...]:
    """Returns the block sizes to choose from; raises PipelineError for a single one that the draft does not have.

    Several hosts must run the same steps, and each measures other times: they have the draft's own size alone.
    """
    largest = 1 if draft is None else draft.config.block_size
    wanted = config.block_sizes
    if draft is None or not wanted or (len(wanted) > 1 and distributed.is_multihost()):
        return (largest,)
    if len(wanted) == 1:
        if not 2 <= wanted[0] <= largest:
            raise PipelineError(f"block_size is {wanted[0]}; the draft has blocks of 2 to {largest}")
        return wanted
    return (*(size for size in sorted(wanted) if size < largest), largest)
