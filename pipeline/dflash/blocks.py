"""Block geometry: which positions a block holds, what it may see, where blocks start, what they learn.

A block has K slots. Slot 0 holds the anchor, the last certain token; slots 1..K-1 hold the mask token and
predict the token at their own position. A block sees the target's features at positions strictly before its
anchor and its own slots, in both directions, and never another block. A row of tokens is one sequence, or several
end to end; then `starts` gives, for every token, where in the row its own sequence begins, and in padding the row's
length.
Source: docs/dflash.md#blocks and docs/dflash.md#loss.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from pipeline.errors import PipelineError


def block_token_ids(anchor_ids: Int[Array, "*batch"], mask_token_id: int, block_size: int) -> Int[Array, "*batch K"]:
    """The tokens that enter the draft: the anchor in slot 0, the mask token in the others."""
    ids = jnp.full((*anchor_ids.shape, block_size), mask_token_id, dtype=anchor_ids.dtype)
    return ids.at[..., 0].set(anchor_ids)


def block_positions(anchors: Int[Array, "*batch"], block_size: int) -> Int[Array, "*batch K"]:
    """Absolute positions of a block's slots: anchor, anchor + 1, ..."""
    return anchors[..., None] + jnp.arange(block_size, dtype=anchors.dtype)


def context_visible(
    anchors: Int[Array, "*batch"], num_positions: int, first: Int[Array, "*batch"] | int = 0
) -> Bool[Array, "*batch T"]:
    """Which of the places 0..T-1 of a row a block may see features of: those strictly before its anchor.

    `first` is where the anchor's sequence begins.
    """
    places = jnp.arange(num_positions)
    return (places < anchors[..., None]) & (places >= jnp.asarray(first)[..., None])


def row_positions(starts: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The position of every token within its own sequence."""
    return jnp.arange(starts.shape[1]) - starts


def anchor_candidates(generated: Bool[np.ndarray, " T"]) -> Int[np.ndarray, " candidates"]:
    """Positions where a block may start: a generated token that is followed by another one.

    The last prompt token is none: in serving the first anchor is the first generated token.
    """
    return np.flatnonzero(generated[:-1] & generated[1:])


def draw_anchors(
    random: np.random.Generator, generated: Bool[np.ndarray, " T"], num_anchors: int
) -> tuple[Int[np.ndarray, " A"], Bool[np.ndarray, " A"]]:
    """Draw anchors without replacement, sorted; returns them and which of the A places are taken.

    A sequence with fewer candidates than A leaves places empty (anchor 0, marked False).
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
    """The token each slot must predict and whether it counts.

    Slot k learns the token at anchor + k. Slot 0, positions past the sequence and tokens the target did not
    generate do not count.
    """
    num_positions = token_ids.shape[1]
    positions = block_positions(anchors, block_size)
    inside = jnp.minimum(positions, num_positions - 1)
    counts = take_at(generated, inside) & (positions < num_positions) & (jnp.arange(block_size) > 0)
    if starts is not None:
        counts &= take_at(starts, inside) == take_at(starts, anchors)[..., None]
    return take_at(token_ids, inside), counts


def take_at(values: Shaped[Array, "B T ..."], places: Int[Array, "B ..."]) -> Shaped[Array, "B ..."]:
    """What stands at places of each row: [B, *places, *width] of values [B, T, *width] and places [B, *places]."""
    return jax.vmap(lambda row, at: row[at])(values, places)


def position_weights(block_size: int, decay: float) -> Float[np.ndarray, " K"]:
    """Loss weight of each slot: exp(-(k - 1) / decay) for k >= 1, 0 for the anchor's slot (paper, App. A.1)."""
    slots = np.arange(block_size)
    return np.where(slots > 0, np.exp(-(slots - 1) / decay), 0.0).astype(np.float32)


def default_decay(block_size: int) -> float:
    """The paper's decay for a block size: 7 for 16, 5 for 10, 4 for 8; linear in between and beyond."""
    return float(np.interp(block_size, [4, 8, 10, 16, 32], [2, 4, 5, 7, 14]))


def default_tapped_layers(num_target_layers: int, count: int) -> list[int]:
    """`count` layers spread evenly from layer 1 to the fourth from the end (docs/dflash.md#tapped-layers).

    GPT-OSS-20b (24 layers), 5 taps: [1, 6, 11, 16, 21]. A target too shallow for that spread taps its
    first layers; the last layer is never tapped, for its output never leaves transformers un-normalised.
    Raises PipelineError when there are fewer layers than that.
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
