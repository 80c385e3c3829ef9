"""Computes the gradients of a batch in parts, so that memory holds what one part needs."""

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
    """Raises PipelineError when the rows of a batch cannot be split evenly over parts and devices."""
    if num_rows % (num_parts * data * fsdp):
        raise PipelineError(
            f"train.batch_sequences is {num_rows}; it must be a multiple of train.accumulation x "
            f"train.mesh.data x train.mesh.fsdp ({num_parts} x {data} x {fsdp})"
        )


def accumulated(
    differentiate: Differentiated, parameters: Any, batch: TrainBatch, num_parts: int, mesh: Mesh
) -> tuple[tuple[Array, Any], Any]:
    """Returns `differentiate(parameters, batch)`, as the sum over the parts, in float32 like the parameters.

    Every device takes a part's rows from its own rows, so that no row moves.
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
    """Returns rows [B, ...] as [parts, B / parts, ...]; every part has rows of each device."""
    num_devices = mesh.shape["dp"] * mesh.shape["fsdp"]
    by_device = array.reshape(num_devices, num_parts, -1, *array.shape[1:])
    parts = jnp.moveaxis(by_device, 1, 0).reshape(num_parts, -1, *array.shape[1:])
    return jax.lax.with_sharding_constraint(parts, NamedSharding(mesh, PartitionSpec(None, ROW_AXES)))
