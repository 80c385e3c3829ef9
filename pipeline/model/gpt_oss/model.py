"""The target as one object."""

from pipeline.model.gpt_oss.config import GptOssConfig
from pipeline.model.gpt_oss.weights import GptOssWeights
from pipeline.model.layers.pytree import pytree_dataclass


@pytree_dataclass(static=("config",))
class TargetModel:
    """Holds a target: its sizes, static to `jit`, and its weights (or their shapes, shardings or partitions)."""

    config: GptOssConfig
    weights: GptOssWeights
