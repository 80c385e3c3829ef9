"""Keys and values that the draft makes of the target's features, before they are in a cache."""

from jaxtyping import Array, Float

from pipeline.model.layers.pytree import pytree_dataclass


@pytree_dataclass()
class LayerContext:
    """Holds one layer's keys and values of T tokens of each row."""

    keys: Float[Array, "B T G H"]
    values: Float[Array, "B T G H"]


@pytree_dataclass()
class DraftContext:
    """Holds all layers' keys and values."""

    layers: tuple[LayerContext, ...]
