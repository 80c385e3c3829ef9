"""Gathers sharded weights where they are used, and scatters their gradients (FSDP).

Left to itself, XLA gathers float32 and casts afterwards, or moves activations instead of weights.
"""

import dataclasses
import functools
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from pipeline.model.dflash.weights import Node

STORED = ("fsdp", "sp")  # axes that weights are split over to save memory alone


def gather_matrices(node: Node, mesh: Mesh, specs: dict[str, PartitionSpec]) -> Node:
    """Returns a node with its matrices gathered over the axes that only store them.

    `specs` has the partition of each matrix by its field's name. Axes along which each device multiplies its own part
    stay split.
    """
    gathered: dict[str, Any] = {}
    for name, spec in specs.items():
        matrix = getattr(node, name, None)
        if matrix is not None:
            gathered[name] = _gathered(NamedSharding(mesh, spec), matrix)
    return dataclasses.replace(node, **gathered)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gathered(stored: NamedSharding, matrix: Float[Array, "in out"]) -> Float[Array, "in out"]:
    local = jax.lax.with_sharding_constraint(matrix, stored)  # in its own precision, before it is sent
    used = PartitionSpec(*(_used(axes) for axes in stored.spec))
    return jax.lax.with_sharding_constraint(local, NamedSharding(stored.mesh, used))


def _forward(stored: NamedSharding, matrix: Array) -> tuple[Array, None]:
    return _gathered(stored, matrix), None


def _backward(stored: NamedSharding, _: None, gradient: Array) -> tuple[Array]:
    return (jax.lax.with_sharding_constraint(gradient, stored),)


_gathered.defvjp(_forward, _backward)


def _used(axes: Any) -> Any:
    """Returns the axes that one dimension stays split over."""
    left = tuple(axis for axis in ((axes,) if isinstance(axes, str) else axes or ()) if axis not in STORED)
    return left or None
