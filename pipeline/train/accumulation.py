"""Gradients of a batch that goes through the model in parts, so that memory holds what one part needs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from pipeline.errors import PipelineError
from pipeline.train.loss.objective import TrainBatch
from pipeline.train.loss.vocab_shard import ROW_AXES

Differentiated = Callable[[Any, TrainBatch], tuple[tuple[Array, Any], Any]]


def require_divisible_batch(num_rows: int, num_parts: int, *, data: int, fsdp: int) -> None:
    """PipelineError when the rows of a batch cannot be shared out evenly to parts and devices."""
    if num_rows % (num_parts * data * fsdp):
        raise PipelineError(
            f"train.batch_sequences is {num_rows}; it must be a multiple of train.accumulation x "
            f"train.mesh.data x train.mesh.fsdp ({num_parts} x {data} x {fsdp})"
        )


def accumulated(
    differentiate: Differentiated, parameters: Any, batch: TrainBatch, num_parts: int, mesh: Mesh
) -> tuple[tuple[Array, Any], Any]:
    """`differentiate(parameters, batch)`: the sum of what it makes of the parts, in float32 like the parameters.

    Every device takes its part's rows from its own, so none of them moves.
    """
    if num_parts == 1:
        return differentiate(parameters, batch)
    parts = jax.tree.map(lambda array: _parts(array, num_parts, mesh), batch)
    first = jax.tree.map(lambda array: array[0], parts)
    nothing = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(differentiate, parameters, first)
    )

    def add(so_far: Any, part: TrainBatch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, so_far, differentiate(parameters, part)), None

    return jax.lax.scan(add, nothing, parts)[0]


def _parts(array: Array, num_parts: int, mesh: Mesh) -> Array:
    """Rows [B, ...] as [parts, B / parts, ...], each device's own rows shared out to all parts."""
    num_devices = mesh.shape["dp"] * mesh.shape["fsdp"]
    own = array.reshape(num_devices, num_parts, -1, *array.shape[1:])
    parts = jnp.moveaxis(own, 1, 0).reshape(num_parts, -1, *array.shape[1:])
    return jax.lax.with_sharding_constraint(parts, NamedSharding(mesh, PartitionSpec(None, ROW_AXES)))
