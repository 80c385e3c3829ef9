"""What a draft learns from: cross entropy of every drafted slot against the target's own text."""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from pipeline.dflash import acceptance, blocks
from pipeline.model import draft
from pipeline.model.draft import DraftConfig, DraftWeights
from pipeline.model.linear import Kernel, product

Out = TypeVar("Out")
MAX_LOGITS = 2**27  # elements held at once; GPT-OSS's vocabulary at 512 anchors would need gigabytes per sequence


class Batch(NamedTuple):
    """B sequences padded to T tokens, and A blocks in each.

    `generated` marks the target's own tokens, `anchor_taken` the places of `anchors` that hold one.
    """

    token_ids: Int[Array, "B T"]
    generated: Bool[Array, "B T"]
    features: Float[Array, "B T LD"]
    anchors: Int[Array, "B A"]
    anchor_taken: Bool[Array, "B A"]


def block_hidden(
    weights: DraftWeights,
    config: DraftConfig,
    embedding: Float[Array, "V D"],
    token_ids: Int[Array, "B T"],
    features: Float[Array, "B T LD"],
    anchors: Int[Array, "B A"],
    *,
    remat: bool = False,
) -> Float[Array, "B A drafted D"]:
    """Final hidden states of the drafted slots (1..K-1) of the blocks at `anchors`, over cached features."""
    num_positions = token_ids.shape[1]
    positions = jnp.broadcast_to(jnp.arange(num_positions), token_ids.shape)
    context = draft.context(weights, config, features, positions)
    anchor_ids = jnp.take_along_axis(token_ids, anchors, axis=1)
    inputs = embedding[blocks.block_token_ids(anchor_ids, config.mask_token_id, config.block_size)]
    visible = blocks.context_visible(anchors, num_positions)
    slots = blocks.block_positions(anchors, config.block_size)
    return draft.denoise_blocks(weights, config, inputs, slots, context, visible, remat=remat)[:, :, 1:]


def draft_loss(
    weights: DraftWeights,
    config: DraftConfig,
    embedding: Float[Array, "V D"],
    head: Kernel,
    batch: Batch,
    slot_weights: Float[np.ndarray, " K"],
    *,
    remat: bool = False,
) -> tuple[Float[Array, ""], dict[str, Num[Array, ""]]]:
    """sum(cross entropy * weight) / sum(weight) over the batch, and what a person watches beside it.

    `slot_weights` is `blocks.slot_weights`. `anchor_accept_length` is the mean of kept + 1 over the batch's
    random anchors; an engine's accept_length is a mean over rounds, which anchor themselves (evaluate.py).
    Source: dflash.md section 4.2 (SpecForge's "dflash" loss); paper, App. A.1.
    """
    hidden = block_hidden(weights, config, embedding, batch.token_ids, batch.features, batch.anchors, remat=remat)
    labels, counts = blocks.block_labels(batch.token_ids, batch.generated, batch.anchors, config.block_size)
    labels, counts = labels[..., 1:], (counts & batch.anchor_taken[..., None])[..., 1:]
    losses, predicted = over_blocks(functools.partial(_cross_entropy, head), hidden, labels, config.vocab_size)
    weight = counts * slot_weights[1:]
    kept = acceptance.count_kept(predicted, jnp.where(counts, labels, -1))
    return (losses * weight).sum() / weight.sum(), {
        "num_tokens": counts.sum(),
        "token_accuracy": ((predicted == labels) & counts).sum() / counts.sum(),
        "anchor_accept_length": 1 + (kept * batch.anchor_taken).sum() / batch.anchor_taken.sum(),
    }


def predict(head: Kernel, hidden: Float[Array, "*batch D"]) -> Int[Array, "*batch"]:
    """The token that each drafted slot proposes."""
    return product(hidden, head).argmax(axis=-1)


def over_blocks(
    function: Callable[..., Out], hidden: Float[Array, "B A drafted D"], labels: Int[Array, "B A drafted"], vocab: int
) -> Out:
    """`function(hidden, labels)`, a few blocks of every sequence at a time when their logits would be large."""
    batch, num_blocks, drafted, _ = hidden.shape
    fitting = max(1, MAX_LOGITS // (batch * drafted * vocab))
    size = max(divisor for divisor in range(1, min(fitting, num_blocks) + 1) if num_blocks % divisor == 0)
    if size == num_blocks:
        return function(hidden, labels)

    def parts(array: Array) -> Array:
        return jnp.moveaxis(array.reshape(batch, num_blocks // size, size, *array.shape[2:]), 1, 0)

    def whole(array: Array) -> Array:
        return jnp.moveaxis(array, 0, 1).reshape(batch, num_blocks, *array.shape[3:])

    # recomputed in the backward pass: keeping every part's logits is what this avoids
    made = jax.lax.map(lambda part: jax.checkpoint(function)(*part), (parts(hidden), parts(labels)))
    return jax.tree.map(whole, made)


def _cross_entropy(
    head: Kernel, hidden: Float[Array, "*batch D"], labels: Int[Array, "*batch"]
) -> tuple[Float[Array, "*batch"], Int[Array, "*batch"]]:
    logits = product(hidden, head)
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked, logits.argmax(axis=-1)
