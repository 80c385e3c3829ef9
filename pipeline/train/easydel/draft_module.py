"""The draft as EasyDeL knows a model: its parameters and their names; the mathematics stays in model/draft.

Parameters carry the paths of `DraftWeights` (`layers/0/query`), which are also their names on disk.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.base_module import EasyDeLBaseModule
from easydel.infra.factory import TaskType, register_config, register_module
from flax import nnx
from jax.sharding import PartitionSpec

from pipeline.model.dflash import weights as dflash_weights
from pipeline.model.dflash.config import DFlashConfig
from pipeline.model.dflash.weights import DFlashLayerWeights, DFlashWeights
from pipeline.model.hf import dflash as hf_dflash

MODEL_TYPE = "dflash_draft"
_OUT, _IN = PartitionSpec(("fsdp", "sp"), "tp"), PartitionSpec("tp", ("fsdp", "sp"))
KERNELS = {  # split over both of their axes [in, out]; everything else is on every device
    "fuse": _OUT,
    "query": _OUT,
    "key": _OUT,
    "value": _OUT,
    "output": _IN,
    "gate": _OUT,
    "up": _OUT,
    "down": _IN,
}


@register_config(MODEL_TYPE)
class DraftModuleConfig(EasyDeLBaseConfig):
    """Carries the draft's HF config (`hf_draft.config_to_hf`) and, for EasyDeL, its sizes."""

    model_type = MODEL_TYPE

    def __init__(self, draft: dict[str, Any] | None = None, **options: Any) -> None:
        self.draft = draft
        super().__init__(**options)

    def to_draft(self) -> DFlashConfig:
        """The config of the draft that the parameters belong to."""
        return hf_dflash.config_from_hf(self.draft)


class Parameters(nnx.Module):
    """The arrays of one node of a weights tree, by field name."""

    def __init__(self, fields: dict[str, jax.Array]) -> None:
        for name, array in fields.items():
            setattr(self, name, nnx.Param(array))

    def craft_sharding(self, **_options: Any) -> dict[str, PartitionSpec]:
        """EasyDeL asks every module for the partition of its own parameters."""
        return _partition(self)


@register_module(TaskType.BASE_MODULE, config=DraftModuleConfig, model_type=MODEL_TYPE)
class DraftModule(EasyDeLBaseModule):
    """A draft in training."""

    _task_type = TaskType.BASE_MODULE
    _model_type = MODEL_TYPE
    _config_class = DraftModuleConfig

    def __init__(
        self,
        config: DraftModuleConfig,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
        precision: Any = None,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(config=config, dtype=dtype, param_dtype=param_dtype, precision=precision, rngs=rngs)
        weights = dflash_weights.random_weights(config.to_draft(), rngs.params(), param_dtype)
        for name, array in _arrays(weights).items():
            setattr(self, name, nnx.Param(array))
        self.layers = nnx.List([Parameters(_arrays(layer)) for layer in weights.layers])

    def weights(self) -> DFlashWeights:
        """The parameters as `model/draft` wants them."""
        layers = tuple(DFlashLayerWeights(**_values(layer, DFlashLayerWeights)) for layer in self.layers)
        return DFlashWeights(**_values(self, DFlashWeights), layers=layers)

    def begin_with(self, weights: DFlashWeights) -> None:
        """Put `weights` in the place of the random ones."""
        for node, values in [(self, weights), *zip(self.layers, weights.layers, strict=True)]:
            for name, array in _arrays(values).items():
                parameter = getattr(node, name)
                given = np.asarray(array, parameter[...].dtype)  # every host has all of it
                parameter[...] = jax.device_put(given, parameter[...].sharding)

    def craft_sharding(self, **_options: Any) -> dict[str, PartitionSpec]:
        """As that of `Parameters`."""
        return _partition(self)

    @classmethod
    def can_generate(cls) -> bool:
        """No: else a module that was loaded again would be saved with a generation config."""
        return False

    def flops_per_token(self, *args: Any, **kwargs: Any) -> float:
        """EasyDeL's estimate fits no block model; ours counts nothing."""
        return 1.0


def _arrays(node: Any) -> dict[str, jax.Array]:
    fields = {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}
    return {name: value for name, value in fields.items() if value is not None and name != "layers"}


def _partition(module: nnx.Module) -> dict[str, PartitionSpec]:
    names = [name for name, value in vars(module).items() if isinstance(value, nnx.Param)]
    return {name: KERNELS.get(name, PartitionSpec()) for name in names}


def _values(module: nnx.Module, kind: type) -> dict[str, jax.Array]:
    found = {field.name: getattr(module, field.name, None) for field in dataclasses.fields(kind)}
    return {name: value[...] for name, value in found.items() if isinstance(value, nnx.Param)}
