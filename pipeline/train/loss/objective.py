"""The loss of a draft: cross entropy of every drafted token against the target's own text."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from pipeline.dflash import acceptance, blocks
from pipeline.model.dflash import forward as dflash
from pipeline.model.dflash.config import DFlashConfig
from pipeline.model.dflash.model import DraftModel
from pipeline.model.dflash.weights import GatherWeights, no_gather
from pipeline.train.loss.cross_entropy import token_losses
from pipeline.train.loss.position_weights import dpace
from pipeline.train.loss.vocab_shard import FrozenTables, embed_tokens
from pipeline.train.recipe import Objective

SMALLEST_WEIGHT = 1e-9  # far below any position's: a batch in which no position counts has loss 0, not NaN


class TrainBatch(NamedTuple):
    """Holds B rows of T tokens, and A blocks in each.

    `generated` marks the target's own tokens, `anchor_taken` the `anchors` that are in use. A row is one sequence,
    padded, or with `starts` (see `blocks.py`) several end to end. Distillation needs `teacher_hidden`, the target's
    final normed hidden states.
    """

    token_ids: Int[Array, "B T"]
    generated: Bool[Array, "B T"]
    features: Float[Array, "B T LD"]
    anchors: Int[Array, "B A"]
    anchor_taken: Bool[Array, "B A"]
    starts: Int[Array, "B T"] | None = None
    teacher_hidden: Float[Array, "B T D"] | None = None


class LossSums(NamedTuple):
    """Holds the sums whose ratios are a loss and its metrics; those of parts of a batch add up.

    `loss` is already divided by the whole batch's normaliser.
    """

    loss: Float[Array, ""]
    num_tokens: Int[Array, ""]
    num_correct: Int[Array, ""]
    num_blocks: Int[Array, ""]
    num_accepted: Int[Array, ""]

    def metrics(self) -> dict[str, Num[Array, ""]]:
        """Returns the metrics; `anchor_accept_length` is the mean of accepted + 1 over the batch's random anchors.

        An engine's accept_length is a mean over rounds, which anchor themselves (evaluate.py).
        """
        return {
            "num_tokens": self.num_tokens,
            "token_accuracy": self.num_correct / jnp.maximum(self.num_tokens, 1),
            "anchor_accept_length": 1 + self.num_accepted / jnp.maximum(self.num_blocks, 1),
        }


def block_hidden(
    draft: DraftModel,
    tables: FrozenTables,
    token_ids: Int[Array, "B T"],
    features: Float[Array, "B T LD"],
    anchors: Int[Array, "B A"],
    starts: Int[Array, "B T"] | None = None,
    *,
    remat: bool = False,
    gather: GatherWeights = no_gather,
) -> Float[Array, "B A drafted D"]:
    """Returns final hidden states of the drafted positions (1..K-1) of the blocks at `anchors`, over cached features.

    `gather` and `remat` as in `dflash.denoise_blocks`.
    """
    if starts is None:
        starts = jnp.zeros_like(token_ids)
    first = blocks.take_at(starts, anchors)
    context = dflash.context(draft, features, blocks.row_positions(starts), gather=gather)
    return dflash.denoise_blocks(
        draft,
        _inputs(draft.config, tables, blocks.take_at(token_ids, anchors)),
        blocks.block_positions(anchors - first, draft.config.block_size),
        context,
        blocks.context_visible(anchors, token_ids.shape[1], first),
        remat=remat,
        gather=gather,
        num_devices=1 if tables.mesh is None else tables.mesh.size,
    )[:, :, 1:]


def normaliser(config: DFlashConfig, batch: TrainBatch, objective: Objective) -> Float[Array, ""]:
    """Returns the divisor of the sum over positions: the sum of weights, or with D-PACE the number of sequences."""
    if objective.dpace_smoothing is None:
        total = (_labels(config, batch)[1] * objective.weights[1:]).sum()
    elif batch.starts is None:
        total = jnp.float32(len(batch.token_ids))
    else:
        total = (batch.starts == jnp.arange(batch.starts.shape[1])).sum().astype(jnp.float32)
    return jnp.maximum(total, SMALLEST_WEIGHT)


def draft_sums(
    draft: DraftModel,
    tables: FrozenTables,
    batch: TrainBatch,
    objective: Objective,
    total: Float[Array, ""],
    *,
    remat: bool = False,
    gather: GatherWeights = no_gather,
) -> LossSums:
    """Returns the sum over positions of loss * weight / `total`, for a batch or a part of the one `total` is of.

    Weights are the objective's, or D-PACE's when it has a smoothing. A position's loss is `cross_entropy.token_losses`.
    With a mesh (of `tables`) rows are split over its (dp, fsdp).
    Source: docs/dflash.md#loss (SpecForge's "dflash" and "dpace" losses); paper, App. A.1.
    """
    config = draft.config
    rows = (batch.token_ids, batch.features, batch.anchors, batch.starts)
    hidden = block_hidden(draft, tables, *rows, remat=remat, gather=gather)
    labels, counts = _labels(config, batch)
    teacher = _teacher(config, batch) if objective.distillation else None
    losses, text, predicted = token_losses(tables, hidden, labels, teacher, distillation=objective.distillation)
    smoothing = objective.dpace_smoothing
    weight = counts * objective.weights[1:] if smoothing is None else dpace(text, counts, smoothing)
    accepted = acceptance.count_accepted(predicted, jnp.where(counts, labels, -1))
    return LossSums(
        loss=(losses * weight).sum() / total,
        num_tokens=counts.sum(),
        num_correct=((predicted == labels) & counts).sum(),
        num_blocks=batch.anchor_taken.sum(),
        num_accepted=(accepted * batch.anchor_taken).sum(),
    )


def _inputs(config: DFlashConfig, tables: FrozenTables, anchor_ids: Int[Array, "B A"]) -> Float[Array, "B A K D"]:
    """Returns the embeddings of [anchor, mask, ...]; the mask is looked up once."""
    ids = jnp.pad(anchor_ids, [(0, 0), (0, 1)], constant_values=config.mask_token_id)
    found = embed_tokens(tables, ids)[:, :, None]
    batch, num_blocks = anchor_ids.shape
    masks = jnp.broadcast_to(found[:, -1:], (batch, num_blocks, config.block_size - 1, found.shape[-1]))
    return jnp.concatenate([found[:, :-1], masks], axis=2)


def _labels(config: DFlashConfig, batch: TrainBatch) -> tuple[Int[Array, "B A drafted"], Bool[Array, "B A drafted"]]:
    labels, counts = blocks.block_labels(
        batch.token_ids, batch.generated, batch.anchors, config.block_size, batch.starts
    )
    return labels[..., 1:], (counts & batch.anchor_taken[..., None])[..., 1:]


def _teacher(config: DFlashConfig, batch: TrainBatch) -> Float[Array, "B A drafted D"]:
    """Returns the states from which the target's head predicts each token: those of the position before."""
    assert batch.teacher_hidden is not None, "distillation needs the target's hidden states"
    last = batch.token_ids.shape[1] - 1
    before = blocks.block_positions(batch.anchors, config.block_size)[..., :-1]
    return blocks.take_at(batch.teacher_hidden, jnp.minimum(before, last))
