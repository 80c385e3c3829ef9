"""Weights that lie in shares on all devices, gathered where they are used (FSDP), and their gradients shared out again.

Left to itself, XLA gathers float32 and casts behind that, or moves activations instead of weights.
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
    """A node whose kernels, by their field's name in `specs`, are whole but for what each device multiplies itself."""
    wide = {}
    for name, spec in specs.items():
        kernel = getattr(node, name, None)
        if kernel is not None:
            wide[name] = _gathered(NamedSharding(mesh, spec), kernel)
    return dataclasses.replace(node, **wide)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gathered(stored: NamedSharding, kernel: Float[Array, "in out"]) -> Float[Array, "in out"]:
    here = jax.lax.with_sharding_constraint(kernel, stored)  # in its own precision, before it travels
    used = PartitionSpec(*(_used(axes) for axes in stored.spec))
    return jax.lax.with_sharding_constraint(here, NamedSharding(stored.mesh, used))


def _forward(stored: NamedSharding, kernel: Array) -> tuple[Array, None]:
    return _gathered(stored, kernel), None


def _backward(stored: NamedSharding, _: None, gradient: Array) -> tuple[Array]:
    return (jax.lax.with_sharding_constraint(gradient, stored),)


_gathered.defvjp(_forward, _backward)


def _used(axes: Any) -> Any:
    """What is left of the axes that one dimension is split over."""
    left = tuple(axis for axis in ((axes,) if isinstance(axes, str) else axes or ()) if axis not in STORED)
    return left or None
