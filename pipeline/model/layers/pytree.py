"""Frozen dataclasses that JAX takes and returns as trees of arrays."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, dataclass_transform, no_type_check

import jax

Class = TypeVar("Class", bound=type)


@dataclass_transform(frozen_default=True)
def pytree_dataclass(*, static: Sequence[str] = ()) -> Callable[[Class], Class]:
    """Makes a class a frozen dataclass that is a pytree; hashable `static` fields are part of its structure.

    Fields are never checked against their types: JAX also rebuilds the class around shapes, masks, shardings and
    gradients.
    """

    def decorate(cls: Class) -> Class:
        frozen: Any = dataclasses.dataclass(frozen=True)(cls)
        names = [field.name for field in dataclasses.fields(frozen)]
        data = [name for name in names if name not in static]
        return no_type_check(jax.tree_util.register_dataclass(frozen, data_fields=data, meta_fields=list(static)))

    return decorate
