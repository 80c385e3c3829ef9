"""Cross entropy in chunks of tokens, over a vocabulary split over devices, so that no device holds all logits.

A token's logits determine the gradient of its loss with respect to its hidden state, up to the factor that arrives in
the backward pass. So the forward pass computes it, chunk by chunk, and the backward pass scales it. No logits are
stored or computed twice.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from pipeline.model.layers.linear import Matrix, TransposedMatrix, product
from pipeline.train.loss.vocab_shard import ROWS_SPEC, FrozenTables, VocabShard, table_spec

MAX_LOGITS = 2**25  # elements a device holds at once


class TokenLosses(NamedTuple):
    """Holds the losses of every drafted token. `loss` alone has a gradient, with respect to the hidden states alone.

    `loss` is (1 - distillation) * `text` + distillation * cross entropy against the teacher's distribution; `text` is
    cross entropy against the token that the text has; `predicted` is the draft's own most likely token.
    """

    loss: Float[Array, "*tokens"]
    text: Float[Array, "*tokens"]
    predicted: Int[Array, "*tokens"]


@dataclasses.dataclass(frozen=True)
class _Task:
    shard: VocabShard
    distillation: float
    mesh: Mesh | None


def token_losses(
    tables: FrozenTables,
    hidden: Float[Array, "*tokens D"],
    labels: Int[Array, "*tokens"],
    teacher: Float[Array, "*tokens D"] | None = None,
    *,
    distillation: float = 0.0,
) -> TokenLosses:
    """Returns the losses of drafted tokens; `teacher` are the target's final normed hidden states for them.

    Cross entropy and not the KL divergence, which is smaller by the teacher's entropy: the gradients are the same,
    and the loss stays comparable with that of the text. Logits, their sums and losses are float32. With a mesh the
    rows of a batch are split over its (dp, fsdp).
    """
    assert (teacher is not None) == (distillation > 0), "distillation needs the teacher's states, and nothing else does"
    mesh = tables.mesh if tables.is_split else None
    task = _Task(VocabShard(tables.vocab_size, is_split=tables.is_split), distillation, mesh)
    return _losses(task, tables.head, hidden, labels, teacher)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(task: _Task, head: Matrix, hidden: Array, labels: Array, teacher: Array | None) -> TokenLosses:
    return _over_devices(task, head, hidden, labels, teacher, with_gradient=False)[0]


def _forward(
    task: _Task, head: Matrix, hidden: Array, labels: Array, teacher: Array | None
) -> tuple[TokenLosses, tuple[Array, Array]]:
    losses, gradient = _over_devices(task, head, hidden, labels, teacher, with_gradient=True)
    assert gradient is not None, "it was asked for"
    return losses, (gradient, jnp.zeros((), hidden.dtype))


def _backward(task: _Task, saved: tuple[Array, Array], cotangents: TokenLosses) -> tuple[None, Array, None, None]:
    gradient, like = saved
    return None, (cotangents.loss[..., None] * gradient).astype(like.dtype), None, None


_losses.defvjp(_forward, _backward)


def _over_devices(
    task: _Task, head: Matrix, hidden: Array, labels: Array, teacher: Array | None, *, with_gradient: bool
) -> tuple[TokenLosses, Array | None]:
    losses_of = functools.partial(_in_chunks, task, with_gradient=with_gradient)
    if task.mesh is None:
        return losses_of(head, hidden, labels, teacher)
    specs = (table_spec(head), ROWS_SPEC, ROWS_SPEC, ROWS_SPEC)
    spread = jax.shard_map(losses_of, mesh=task.mesh, in_specs=specs, out_specs=ROWS_SPEC, check_vma=False)
    return spread(head, hidden, labels, teacher)


def _in_chunks(
    task: _Task, head: Matrix, hidden: Array, labels: Array, teacher: Array | None, *, with_gradient: bool
) -> tuple[TokenLosses, Array | None]:
    """Returns the losses of this device's tokens, and the gradients of `loss`, computed a chunk of tokens at a time."""
    num_tokens, num_local = labels.size, _num_rows(head)
    shares = 1 if task.mesh is None else task.mesh.shape["fsdp"]
    size = max(1, min(num_tokens, MAX_LOGITS // (shares * num_local)))
    num_chunks = -(-num_tokens // size)
    size = -(-num_tokens // num_chunks)  # chunks of equal size, as nearly as can be

    def parts(array: Array) -> Array:
        flat = array.reshape(num_tokens, *array.shape[labels.ndim :])
        padded = jnp.pad(flat, [(0, num_chunks * size - num_tokens)] + [(0, 0)] * (flat.ndim - 1))
        return padded.reshape(num_chunks, size, *flat.shape[1:])

    def whole(array: Array) -> Array:
        flat = array.reshape(num_chunks * size, *array.shape[2:])
        return flat[:num_tokens].reshape(*labels.shape, *flat.shape[1:])

    def chunk(part: tuple[Array, Array, Array | None]) -> tuple[TokenLosses, Array | None]:
        return _chunk(task, head, *part, with_gradient=with_gradient)

    return jax.tree.map(whole, _mapped(chunk, jax.tree.map(parts, (hidden, labels, teacher))))


def _mapped(function: Callable[[Any], Any], parts: Any) -> Any:
    """Does as `jax.lax.map`, without a loop when there is one part."""
    if len(jax.tree.leaves(parts)[0]) > 1:
        return jax.lax.map(function, parts)
    result = function(jax.tree.map(lambda array: array[0], parts))
    return jax.tree.map(lambda array: array[None], result)


def _chunk(
    task: _Task,
    head: Matrix,
    hidden: Float[Array, "rows D"],
    labels: Int[Array, " rows"],
    teacher: Float[Array, "rows D"] | None,
    *,
    with_gradient: bool,
) -> tuple[TokenLosses, Float[Array, "rows D"] | None]:
    shard, num_rows = task.shard, len(labels)
    labels = shard.all_gather(labels)
    logits = shard.mask_padding(product(shard.all_gather(hidden), head))
    peak, predicted = shard.axis.argmax(logits)
    powers = jnp.exp(logits - peak[:, None])
    total, picked = shard.axis.sum(jnp.stack([powers.sum(axis=-1), shard.axis.take_partial(logits, labels)]))
    log_sum = peak + jnp.log(total)
    text = loss = log_sum - picked
    wanted = None
    if teacher is not None:
        wanted = _distribution(shard, head, shard.all_gather(teacher))
        # rows that pad the table have no share, and a logit of minus infinity
        shared = shard.axis.sum(jnp.where(wanted > 0, wanted * logits, 0).sum(axis=-1))
        loss = (1 - task.distillation) * text + task.distillation * (log_sum - shared)
    losses = TokenLosses(*(shard.local_rows(array, num_rows) for array in (loss, text, predicted)))
    if not with_gradient:
        return losses, None
    surplus = powers / total[:, None] - (1 - task.distillation) * _one_hot(shard, labels, logits.shape[-1])
    if wanted is not None:
        surplus -= task.distillation * wanted
    return losses, shard.reduce_scatter(product(surplus.astype(hidden.dtype), _transposed(head)))


def _distribution(shard: VocabShard, head: Matrix, teacher: Float[Array, "tokens D"]) -> Float[Array, "tokens local"]:
    """Returns the teacher's probabilities of this device's share of the vocabulary."""
    logits = shard.mask_padding(
        product(teacher.astype(_table(head).dtype), head)
    )  # as the target itself multiplies them
    powers = jnp.exp(logits - shard.axis.argmax(logits)[0][:, None])
    return powers / shard.axis.sum(powers.sum(axis=-1))[:, None]


def _one_hot(shard: VocabShard, labels: Int[Array, " tokens"], num_local: int) -> Float[Array, "tokens local"]:
    return (labels[:, None] - shard.axis.offset(num_local) == jnp.arange(num_local)).astype(jnp.float32)


def _table(head: Matrix) -> Array:
    return head.array if isinstance(head, TransposedMatrix) else head


def _num_rows(head: Matrix) -> int:
    return head.array.shape[0] if isinstance(head, TransposedMatrix) else head.shape[1]


def _transposed(head: Matrix) -> Matrix:
    """Returns the matrix that multiplies from the vocabulary back to hidden states."""
    return head.array if isinstance(head, TransposedMatrix) else TransposedMatrix(head)
