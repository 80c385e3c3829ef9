"""What a draft learns from: cross entropy of every drafted slot against the target's own text."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Num

from pipeline.dflash import acceptance, blocks
from pipeline.model import draft
from pipeline.model.draft import DraftConfig, DraftWeights, Opened, as_it_is
from pipeline.model.linear import Kernel
from pipeline.train import vocabulary
from pipeline.train.cross_entropy import token_losses
from pipeline.train.loss_weights import dpace

SMALLEST_WEIGHT = 1e-9  # far below any slot's: a batch in which nothing counts has loss 0 instead of none


class Batch(NamedTuple):
    """B rows of T tokens, and A blocks in each.

    `generated` marks the target's own tokens, `anchor_taken` the places of `anchors` that hold one. A row is one
    sequence, padded, or with `starts` several end to end (`blocks.py` says what they are). `teacher_hidden`, the
    target's final normed hidden states, is what distillation needs.
    """

    token_ids: Int[Array, "B T"]
    generated: Bool[Array, "B T"]
    features: Float[Array, "B T LD"]
    anchors: Int[Array, "B A"]
    anchor_taken: Bool[Array, "B A"]
    starts: Int[Array, "B T"] | None = None
    teacher_hidden: Float[Array, "B T D"] | None = None


class Sums(NamedTuple):
    """What a loss and what a person watches beside it are ratios of; of parts of a batch they add up.

    `loss` is already over the whole batch's normaliser.
    """

    loss: Float[Array, ""]
    num_tokens: Int[Array, ""]
    num_right: Int[Array, ""]
    num_blocks: Int[Array, ""]
    num_kept: Int[Array, ""]

    def metrics(self) -> dict[str, Num[Array, ""]]:
        """`anchor_accept_length` is the mean of kept + 1 over the batch's random anchors.

        An engine's accept_length is a mean over rounds, which anchor themselves (evaluate.py).
        """
        return {
            "num_tokens": self.num_tokens,
            "token_accuracy": self.num_right / jnp.maximum(self.num_tokens, 1),
            "anchor_accept_length": 1 + self.num_kept / jnp.maximum(self.num_blocks, 1),
        }


def block_hidden(
    weights: DraftWeights,
    config: DraftConfig,
    embedding: Float[Array, "V D"],
    token_ids: Int[Array, "B T"],
    features: Float[Array, "B T LD"],
    anchors: Int[Array, "B A"],
    starts: Int[Array, "B T"] | None = None,
    *,
    remat: bool = False,
    mesh: Mesh | None = None,
    opened: Opened = as_it_is,
) -> Float[Array, "B A drafted D"]:
    """Final hidden states of the drafted slots (1..K-1) of the blocks at `anchors`, over cached features.

    `mesh` as in `draft_loss`, `opened` and `remat` as in `draft.denoise_blocks`.
    """
    if starts is None:
        starts = jnp.zeros_like(token_ids)
    first = blocks.at_places(starts, anchors)
    context = draft.context(weights, config, features, blocks.row_positions(starts), opened=opened)
    return draft.denoise_blocks(
        weights,
        config,
        _inputs(config, embedding, blocks.at_places(token_ids, anchors), mesh),
        blocks.block_positions(anchors - first, config.block_size),
        context,
        blocks.context_visible(anchors, token_ids.shape[1], first),
        remat=remat,
        opened=opened,
        num_devices=1 if mesh is None else mesh.size,
    )[:, :, 1:]


def draft_loss(
    weights: DraftWeights,
    config: DraftConfig,
    embedding: Float[Array, "V D"],
    head: Kernel,
    batch: Batch,
    slot_weights: Float[np.ndarray, " K"],
    *,
    dpace_smoothing: float | None = None,
    distillation: float = 0.0,
    remat: bool = False,
) -> tuple[Float[Array, ""], dict[str, Num[Array, ""]]]:
    """The loss of a whole batch, and what a person watches beside it: see `draft_sums`."""
    total = normaliser(config, batch, slot_weights, dpace_smoothing)
    sums = draft_sums(
        weights,
        config,
        embedding,
        head,
        batch,
        slot_weights,
        total,
        dpace_smoothing=dpace_smoothing,
        distillation=distillation,
        remat=remat,
    )
    return sums.loss, sums.metrics()


def normaliser(
    config: DraftConfig, batch: Batch, slot_weights: Float[np.ndarray, " K"], dpace_smoothing: float | None = None
) -> Float[Array, ""]:
    """What the sum over slots is divided by: the sum of `slot_weights`, or under D-PACE the number of sequences."""
    if dpace_smoothing is None:
        total = (_labels(config, batch)[1] * slot_weights[1:]).sum()
    elif batch.starts is None:
        total = jnp.float32(len(batch.token_ids))
    else:
        total = (batch.starts == jnp.arange(batch.starts.shape[1])).sum().astype(jnp.float32)
    return jnp.maximum(total, SMALLEST_WEIGHT)


def draft_sums(
    weights: DraftWeights,
    config: DraftConfig,
    embedding: Float[Array, "V D"],
    head: Kernel,
    batch: Batch,
    slot_weights: Float[np.ndarray, " K"],
    total: Float[Array, ""],
    *,
    dpace_smoothing: float | None = None,
    distillation: float = 0.0,
    remat: bool = False,
    mesh: Mesh | None = None,
    opened: Opened = as_it_is,
) -> Sums:
    """The sum over slots of loss * weight / `total`, for a batch or a part of the one that `total` was counted in.

    Weights are `slot_weights` (`blocks.slot_weights`), or D-PACE's when `dpace_smoothing` is given. A slot's loss is
    `cross_entropy.token_losses`. With a `mesh` rows are split over its (dp, fsdp), and `embedding` and `head` are
    those that `vocabulary.share_out` placed.
    Source: dflash.md section 4.2 (SpecForge's "dflash" and "dpace" losses); paper, App. A.1.
    """
    rows = (batch.token_ids, batch.features, batch.anchors, batch.starts)
    hidden = block_hidden(weights, config, embedding, *rows, remat=remat, mesh=mesh, opened=opened)
    labels, counts = _labels(config, batch)
    losses, text, predicted = token_losses(
        head,
        hidden,
        labels,
        _teacher(config, batch) if distillation else None,
        vocab_size=config.vocab_size,
        distillation=distillation,
        mesh=mesh,
    )
    weight = counts * slot_weights[1:] if dpace_smoothing is None else dpace(text, counts, dpace_smoothing)
    kept = acceptance.count_kept(predicted, jnp.where(counts, labels, -1))
    return Sums(
        loss=(losses * weight).sum() / total,
        num_tokens=counts.sum(),
        num_right=((predicted == labels) & counts).sum(),
        num_blocks=batch.anchor_taken.sum(),
        num_kept=(kept * batch.anchor_taken).sum(),
    )


def _inputs(
    config: DraftConfig, embedding: Float[Array, "V D"], anchor_ids: Int[Array, "B A"], mesh: Mesh | None
) -> Float[Array, "B A K D"]:
    """The embeddings of [anchor, mask, ...], each looked up once."""
    ids = jnp.pad(anchor_ids, [(0, 0), (0, 1)], constant_values=config.mask_token_id)
    found = vocabulary.embed(embedding, ids, mesh)[:, :, None]
    batch, num_blocks = anchor_ids.shape
    masks = jnp.broadcast_to(found[:, -1:], (batch, num_blocks, config.block_size - 1, found.shape[-1]))
    return jnp.concatenate([found[:, :-1], masks], axis=2)


def _labels(config: DraftConfig, batch: Batch) -> tuple[Int[Array, "B A drafted"], Bool[Array, "B A drafted"]]:
    labels, counts = blocks.block_labels(
        batch.token_ids, batch.generated, batch.anchors, config.block_size, batch.starts
    )
    return labels[..., 1:], (counts & batch.anchor_taken[..., None])[..., 1:]


def _teacher(config: DraftConfig, batch: Batch) -> Float[Array, "B A drafted D"]:
    """The states that the target's head turns into its distribution of each slot's token: those a position before."""
    last = batch.token_ids.shape[1] - 1
    before = blocks.block_positions(batch.anchors, config.block_size)[..., :-1]
    return blocks.at_places(batch.teacher_hidden, jnp.minimum(before, last))
