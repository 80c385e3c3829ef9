"""How many tokens a draft would yield per round on text that the target wrote: the engine's count, without it."""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from pipeline.dflash import acceptance, blocks
from pipeline.dflash.acceptance import Acceptance
from pipeline.dflash.scored import ScoredText, acceptance_of
from pipeline.model.draft import DraftConfig, DraftWeights
from pipeline.model.linear import Kernel
from pipeline.teacher_cache.store import CachedSequence, CacheSplit
from pipeline.train.batches import padded_length, stack
from pipeline.train.loss import block_hidden, over_blocks, predict

SEQUENCES_PER_PASS, BLOCKS_PER_PASS = 8, 48


def evaluate(
    weights: DraftWeights,
    config: DraftConfig,
    embedding: Float[Array, "V D"],
    head: Kernel,
    split: CacheSplit,
    *,
    num_sequences: int | None = None,
) -> Acceptance:
    """The rounds of `score`, all together."""
    texts = score(weights, config, embedding, head, split, num_sequences=num_sequences)
    return acceptance_of(texts, config.block_size)


def score(
    weights: DraftWeights,
    config: DraftConfig,
    embedding: Float[Array, "V D"],
    head: Kernel,
    split: CacheSplit,
    *,
    num_sequences: int | None = None,
) -> list[ScoredText]:
    """The rounds of an engine that decodes the first `num_sequences` texts of a split (default: all), in order.

    A block is drafted at every generated position, over the cached features before it; walking from the
    first generated token by what each block keeps gives exactly the rounds that greedy decoding runs.
    """
    count = split.num_sequences if num_sequences is None else min(num_sequences, split.num_sequences)
    num_generated = split.num_tokens[:count] - split.prompt_tokens[:count]
    order = np.argsort(num_generated, kind="stable")  # rows of a pass have about as many blocks
    found: dict[int, ScoredText] = {}
    for start in range(0, count, SEQUENCES_PER_PASS):
        indices = [int(index) for index in order[start : start + SEQUENCES_PER_PASS]]
        sequences = split.read(indices)
        kept_at = _kept_everywhere(weights, config, embedding, head, sequences, padded_length(split.num_tokens))
        for index, sequence, kept in zip(indices, sequences, kept_at, strict=True):
            found[index] = ScoredText(
                prompt_id=split.prompt_ids[index],
                prompt_tokens=sequence.prompt_tokens,
                token_ids=tuple(sequence.token_ids.tolist()),
                kept=tuple(acceptance.walk(kept, sequence.prompt_tokens, len(sequence.token_ids))),
            )
    return [found[index] for index in range(count)]


def _kept_everywhere(
    weights: DraftWeights,
    config: DraftConfig,
    embedding: Float[Array, "V D"],
    head: Kernel,
    sequences: Sequence[CachedSequence],
    num_positions: int,
) -> Int[np.ndarray, "B T"]:
    """What a block keeps at each position of each sequence; 0 where no block starts."""
    rows = [*sequences, *[sequences[0]] * (SEQUENCES_PER_PASS - len(sequences))]  # one compiled shape
    inputs = stack(rows, num_positions)
    inputs = {name: jax.device_put(inputs[name]) for name in ("token_ids", "features")}
    first = np.array([sequence.prompt_tokens for sequence in rows])
    last = np.array([len(sequence.token_ids) for sequence in rows]) - 2
    kept_at = np.zeros((len(rows), num_positions), dtype=np.int32)
    for offset in range(0, int((last - first).max()) + 1, BLOCKS_PER_PASS):
        anchors = first[:, None] + np.arange(offset, offset + BLOCKS_PER_PASS)
        anchors = np.clip(anchors, 0, np.maximum(last, 0)[:, None]).astype(np.int32)
        kept = _kept(weights, config, embedding, head, **inputs, anchors=anchors)
        np.put_along_axis(kept_at, anchors, np.asarray(kept), axis=1)
    return kept_at[: len(sequences)]


@functools.partial(jax.jit, static_argnames="config")
def _kept(
    weights: DraftWeights,
    config: DraftConfig,
    embedding: Float[Array, "V D"],
    head: Kernel,
    token_ids: Int[Array, "B T"],
    features: Float[Array, "B T LD"],
    anchors: Int[Array, "B A"],
) -> Int[Array, "B A"]:
    hidden = block_hidden(weights, config, embedding, token_ids, features, anchors)
    # past the end of a text the last token is repeated; `walk` counts no token there
    labels = blocks.block_labels(token_ids, token_ids >= 0, anchors, config.block_size)[0][..., 1:]
    predicted = over_blocks(lambda part, _: predict(head, part), hidden, labels, config.vocab_size)
    return acceptance.count_kept(predicted, labels)
