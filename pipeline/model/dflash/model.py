"""The draft as one object."""

from pipeline.model.dflash.config import DFlashConfig
from pipeline.model.dflash.weights import DFlashWeights
from pipeline.model.layers.pytree import pytree_dataclass


@pytree_dataclass(static=("config",))
class DraftModel:
    """Holds a draft: its sizes, static to `jit`, and its weights (or their shapes, shardings or partitions)."""

    config: DFlashConfig
    weights: DFlashWeights
