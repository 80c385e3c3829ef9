"""How many tokens a draft would yield per round on text that the target wrote: the engine's count, without it."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from pipeline import hosts
from pipeline.dflash import acceptance, blocks
from pipeline.dflash.scored import ScoredText
from pipeline.model.draft import DraftConfig, DraftWeights
from pipeline.model.linear import Kernel
from pipeline.prompts.channels import Channel
from pipeline.teacher_cache.store import CachedSequence, CacheSplit
from pipeline.train import vocabulary
from pipeline.train.batches import padded_length, stack
from pipeline.train.cross_entropy import token_losses
from pipeline.train.loss import block_hidden
from pipeline.train.score import Score, Tally

SEQUENCES_PER_PASS, BLOCKS_PER_PASS = 8, 48


def evaluate(
    weights: DraftWeights,
    config: DraftConfig,
    embedding: Float[Array, "V D"],
    head: Kernel,
    split: CacheSplit,
    *,
    num_sequences: int | None = None,
    filled: Callable[[list[CachedSequence]], list[CachedSequence]] | None = None,
    mesh: Mesh | None = None,
) -> Score:
    """The rounds of an engine that decodes the first `num_sequences` texts of a split (default: all).

    `filled` gives sequences that are stored without features theirs. With a `mesh` the weights lie on it, and
    embedding and head as `vocabulary.share_out` placed them.
    A block is drafted at every generated position, over the cached features before it; walking from the
    first generated token by what each block keeps gives exactly the rounds that greedy decoding runs.
    """
    count = split.num_sequences if num_sequences is None else min(num_sequences, split.num_sequences)
    num_generated = split.num_tokens[:count] - split.prompt_tokens[:count]
    order = np.argsort(num_generated, kind="stable")  # rows of a pass have about as many blocks
    tally, texts = Tally(config.block_size), {}
    size = math.lcm(SEQUENCES_PER_PASS, vocabulary.num_row_shares(mesh))
    place = functools.partial(jax.device_put, device=mesh and NamedSharding(mesh, vocabulary.ROWS_SPEC))
    drafted = functools.partial(_kept, weights, config, embedding, head, mesh=mesh)
    longest = padded_length(split.num_tokens)
    for start in range(0, count, size):
        indices = [int(index) for index in order[start : start + size]]
        sequences = split.read(indices) if filled is None else filled(split.read(indices))
        padding = [sequences[0]] * (size - len(sequences))  # one compiled shape
        kept_at = _kept_everywhere(drafted, [*sequences, *padding], longest, place)
        for index, sequence, kept in zip(indices, sequences, kept_at, strict=False):
            rounds = acceptance.walk(kept, sequence.prompt_tokens, len(sequence.token_ids))
            tally.add(rounds, _channels(sequence, rounds), split.efforts[index])
            texts[index] = ScoredText(
                prompt_id=split.prompt_ids[index],
                prompt_tokens=sequence.prompt_tokens,
                token_ids=tuple(sequence.token_ids.tolist()),
                kept=tuple(rounds),
            )
    return dataclasses.replace(tally.score(), texts=tuple(texts[index] for index in range(count)))


def _channels(sequence: CachedSequence, rounds: list[int]) -> list[str]:
    """The channel of the first token that each round yields."""
    first = sequence.prompt_tokens + 1 + np.cumsum([0, *(kept + 1 for kept in rounds)])[:-1]
    return [Channel(sequence.channels[at]).name for at in first]


def _kept_everywhere(
    drafted: Callable[..., Int[Array, "B A"]],
    sequences: Sequence[CachedSequence],
    num_positions: int,
    place: Callable[[np.ndarray], Array],
) -> Int[np.ndarray, "B T"]:
    """What a block keeps at each position of each sequence; 0 where no block starts."""
    inputs = stack(sequences, num_positions)
    inputs = {name: place(inputs[name]) for name in ("token_ids", "features")}
    first = np.array([sequence.prompt_tokens for sequence in sequences])
    last = np.array([len(sequence.token_ids) for sequence in sequences]) - 2
    kept_at = np.zeros((len(sequences), num_positions), dtype=np.int32)
    for offset in range(0, int((last - first).max()) + 1, BLOCKS_PER_PASS):
        anchors = first[:, None] + np.arange(offset, offset + BLOCKS_PER_PASS)
        anchors = np.clip(anchors, 0, np.maximum(last, 0)[:, None]).astype(np.int32)
        kept = drafted(**inputs, anchors=place(anchors))
        np.put_along_axis(kept_at, anchors, hosts.whole(kept), axis=1)
    return kept_at


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _kept(
    weights: DraftWeights,
    config: DraftConfig,
    embedding: Float[Array, "V D"],
    head: Kernel,
    token_ids: Int[Array, "B T"],
    features: Float[Array, "B T LD"],
    anchors: Int[Array, "B A"],
    mesh: Mesh | None,
) -> Int[Array, "B A"]:
    hidden = block_hidden(weights, config, embedding, token_ids, features, anchors, mesh=mesh)
    # past the end of a text the last token is repeated; `walk` counts no token there
    labels = blocks.block_labels(token_ids, token_ids >= 0, anchors, config.block_size)[0][..., 1:]
    found = token_losses(head, hidden, labels, vocab_size=config.vocab_size, mesh=mesh)
    return acceptance.count_kept(found.predicted, labels)
