"""Counts how many tokens a draft yields per round on text that the target wrote: the engine's rounds, without it."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Int

from pipeline import distributed
from pipeline.dflash import acceptance, blocks
from pipeline.model.dflash.model import DraftModel
from pipeline.prompts.channels import Channel
from pipeline.store.heldout_rounds import HeldoutText
from pipeline.store.layout import CachedSequence
from pipeline.store.reader import CacheSplit
from pipeline.train.data.rows import padded_row_length, stack
from pipeline.train.evaluation.score import Score, Tally
from pipeline.train.loss import vocab_shard
from pipeline.train.loss.cross_entropy import token_losses
from pipeline.train.loss.objective import block_hidden
from pipeline.train.loss.vocab_shard import FrozenTables

EVALUATED_SEQUENCES = 256  # of a split, at most
SEQUENCES_PER_PASS, BLOCKS_PER_PASS = 8, 48


def evaluate(
    draft: DraftModel,
    tables: FrozenTables,
    split: CacheSplit,
    *,
    num_sequences: int | None = None,
    with_features: Callable[[list[CachedSequence]], list[CachedSequence]] | None = None,
) -> Score:
    """Returns the rounds that an engine would run to decode the first `num_sequences` texts of a split (default: all).

    `with_features` computes the features of sequences that are stored without them. With a mesh (of `tables`) the
    draft's weights are on it too. A block is drafted at every generated position, over the cached features before it;
    the walk from the first generated token by the tokens each block yields is exactly the rounds of greedy decoding.
    """
    mesh = tables.mesh
    count = split.num_sequences if num_sequences is None else min(num_sequences, split.num_sequences)
    num_generated = split.num_tokens[:count] - split.prompt_tokens[:count]
    order = np.argsort(num_generated, kind="stable")  # rows of a pass have about as many blocks
    tally, texts = Tally(draft.config.block_size), {}
    size = math.lcm(SEQUENCES_PER_PASS, vocab_shard.num_row_shards(mesh))
    put = functools.partial(jax.device_put, device=mesh and NamedSharding(mesh, vocab_shard.ROWS_SPEC))
    drafted = functools.partial(_accepted, draft, tables)
    longest = padded_row_length(split.num_tokens)
    for start in range(0, count, size):
        indices = [int(index) for index in order[start : start + size]]
        sequences = split.read(indices) if with_features is None else with_features(split.read(indices))
        padding = [sequences[0]] * (size - len(sequences))  # one compiled shape
        accepted_at = _accepted_everywhere(drafted, [*sequences, *padding], longest, put)
        for index, sequence, accepted in zip(indices, sequences, accepted_at, strict=False):
            rounds = acceptance.rounds_over_text(accepted, sequence.prompt_tokens, len(sequence.token_ids))
            tally.add(rounds, _channels(sequence, rounds), split.efforts[index])
            texts[index] = HeldoutText(
                prompt_id=split.prompt_ids[index],
                prompt_tokens=sequence.prompt_tokens,
                token_ids=tuple(sequence.token_ids.tolist()),
                accepted_per_round=tuple(rounds),
            )
    return dataclasses.replace(tally.score(), texts=tuple(texts[index] for index in range(count)))


def _channels(sequence: CachedSequence, rounds: list[int]) -> list[str]:
    """Returns the channel of the first token that each round yields."""
    first = sequence.prompt_tokens + 1 + np.cumsum([0, *(count + 1 for count in rounds)])[:-1]
    return [Channel(sequence.channels[position]).name for position in first]


def _accepted_everywhere(
    drafted: Callable[..., Int[Array, "B A"]],
    sequences: Sequence[CachedSequence],
    num_positions: int,
    put: Callable[[np.ndarray], Array],
) -> Int[np.ndarray, "B T"]:
    """Returns how many tokens of a block are accepted at each position of each sequence; 0 where no block starts."""
    rows = stack(sequences, num_positions)
    inputs = {name: put(rows[name]) for name in ("token_ids", "features")}
    first = np.array([sequence.prompt_tokens for sequence in sequences])
    last = np.array([len(sequence.token_ids) for sequence in sequences]) - 2
    accepted_at = np.zeros((len(sequences), num_positions), dtype=np.int32)
    for offset in range(0, int((last - first).max()) + 1, BLOCKS_PER_PASS):
        anchors = first[:, None] + np.arange(offset, offset + BLOCKS_PER_PASS)
        anchors = np.clip(anchors, 0, np.maximum(last, 0)[:, None]).astype(np.int32)
        accepted = drafted(**inputs, anchors=put(anchors))
        np.put_along_axis(accepted_at, anchors, distributed.gather_to_host(accepted), axis=1)
    return accepted_at


@jax.jit
def _accepted(
    draft: DraftModel,
    tables: FrozenTables,
    token_ids: Int[Array, "B T"],
    features: Array,
    anchors: Int[Array, "B A"],
) -> Int[Array, "B A"]:
    hidden = block_hidden(draft, tables, token_ids, features, anchors)
    # past the end of a text the last token is repeated; `rounds_over_text` counts no token there
    labels = blocks.block_labels(token_ids, token_ids >= 0, anchors, draft.config.block_size)[0][..., 1:]
    return acceptance.count_accepted(token_losses(tables, hidden, labels).predicted, labels)
