"""Block geometry: which positions a block holds, what it may see, where blocks start, what they learn.

A block has K positions. Position 0 holds the anchor, the last certain token; positions 1..K-1 hold the mask token and
predict the token that stands there in the text. A block sees the target's features at text positions strictly before
its anchor and its own K positions, in both directions, and never another block. A row of tokens is one sequence, or
several end to end; then `starts` gives, for every token, the index in the row at which the token's sequence begins,
and in padding the row's length.
Source: docs/dflash.md#blocks and docs/dflash.md#loss.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from pipeline.errors import PipelineError


def block_token_ids(anchor_ids: Int[Array, "*batch"], mask_token_id: int, block_size: int) -> Int[Array, "*batch K"]:
    """Returns the tokens that enter the draft: the anchor at block position 0, the mask token at the others."""
    ids = jnp.full((*anchor_ids.shape, block_size), mask_token_id, dtype=anchor_ids.dtype)
    return ids.at[..., 0].set(anchor_ids)


def block_positions(anchors: Int[Array, "*batch"], block_size: int) -> Int[Array, "*batch K"]:
    """Returns the absolute positions of a block: anchor, anchor + 1, ..."""
    return anchors[..., None] + jnp.arange(block_size, dtype=anchors.dtype)


def context_visible(
    anchors: Int[Array, "*batch"], num_positions: int, first: Int[Array, "*batch"] | int = 0
) -> Bool[Array, "*batch T"]:
    """Returns whether a block may see the features at each index 0..T-1 of a row: those strictly before its anchor.

    `first` is the index at which the anchor's sequence begins.
    """
    indices = jnp.arange(num_positions)
    return (indices < anchors[..., None]) & (indices >= jnp.asarray(first)[..., None])


def row_positions(starts: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Returns the position of every token within its own sequence."""
    return jnp.arange(starts.shape[1]) - starts


def anchor_candidates(generated: Bool[np.ndarray, " T"]) -> Int[np.ndarray, " candidates"]:
    """Returns the positions where a block may start: a generated token that is followed by another one.

    The last prompt token is not among them: in serving the first anchor is the first generated token.
    """
    return np.flatnonzero(generated[:-1] & generated[1:])


def draw_anchors(
    random: np.random.Generator, generated: Bool[np.ndarray, " T"], num_anchors: int
) -> tuple[Int[np.ndarray, " A"], Bool[np.ndarray, " A"]]:
    """Draws A anchors without replacement; returns them, sorted, and which of them are real.

    Where a sequence has fewer candidates than A, the last anchors are 0 and marked False.
    """
    candidates = anchor_candidates(generated)
    count = min(num_anchors, len(candidates))
    anchors = np.zeros(num_anchors, dtype=np.int32)
    anchors[:count] = np.sort(random.choice(candidates, size=count, replace=False))
    return anchors, np.arange(num_anchors) < count


def block_labels(
    token_ids: Int[Array, "B T"],
    generated: Bool[Array, "B T"],
    anchors: Int[Array, "B A"],
    block_size: int,
    starts: Int[Array, "B T"] | None = None,
) -> tuple[Int[Array, "B A K"], Bool[Array, "B A K"]]:
    """Returns the token that each block position must predict, and whether it counts.

    Block position k learns the token at anchor + k. Block position 0, positions past the sequence and tokens that the
    target did not generate do not count.
    """
    num_positions = token_ids.shape[1]
    positions = block_positions(anchors, block_size)
    inside = jnp.minimum(positions, num_positions - 1)
    counts = take_at(generated, inside) & (positions < num_positions) & (jnp.arange(block_size) > 0)
    if starts is not None:
        counts &= take_at(starts, inside) == take_at(starts, anchors)[..., None]
    return take_at(token_ids, inside), counts


def take_at(values: Shaped[Array, "B T ..."], indices: Int[Array, "B ..."]) -> Shaped[Array, "B ..."]:
    """Returns the values at indices of each row: values [B, T, *width], indices [B, *shape] -> [B, *shape, *width]."""
    return jax.vmap(lambda row, index: row[index])(values, indices)


def position_weights(block_size: int, decay: float) -> Float[np.ndarray, " K"]:
    """Returns the loss weight of block positions k: exp(-(k - 1) / decay), 0 for the anchor (paper, App. A.1)."""
    positions = np.arange(block_size)
    return np.where(positions > 0, np.exp(-(positions - 1) / decay), 0.0).astype(np.float32)


def default_decay(block_size: int) -> float:
    """Returns the paper's decay for a block size: 7 for 16, 5 for 10, 4 for 8; linear in between and beyond."""
    return float(np.interp(block_size, [4, 8, 10, 16, 32], [2, 4, 5, 7, 14]))


def default_tapped_layers(num_target_layers: int, count: int) -> list[int]:
    """Returns `count` layers spread evenly from layer 1 to the fourth from the end (docs/dflash.md#tapped-layers).

    Of GPT-OSS-20b (24 layers) 5 taps are [1, 6, 11, 16, 21]. A target too shallow for that spread taps its
    first layers; the last layer is never tapped, for transformers only returns its output normalised.
    Raises PipelineError when the target has too few layers.
    """
    if count > num_target_layers - 1:
        raise PipelineError(
            f"{count} layers are to be tapped; a target of {num_target_layers} layers has {num_target_layers - 1} for "
            "that: lower draft.num_tapped_layers"
        )
    if count == 1:
        return [min(num_target_layers // 2, num_target_layers - 2)]
    span = num_target_layers - 4
    if span < count - 1:
        return [round(i * (num_target_layers - 2) / (count - 1)) for i in range(count)]
    return [round(1 + i * span / (count - 1)) for i in range(count)]
