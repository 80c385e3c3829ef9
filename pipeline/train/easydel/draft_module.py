"""The draft as an EasyDeL model: its parameters and their names. The mathematics stays in `pipeline/model/dflash`.

Parameters have the paths of `DFlashWeights` (`layers/0/query`), which are also their names on disk.
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
MATRICES = {  # each split over both of its axes [in, out]; everything else is on every device
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
    """Carries the draft's HF config (`hf_dflash.config_to_hf`) and, for EasyDeL, its sizes."""

    model_type = MODEL_TYPE

    def __init__(self, draft: dict[str, Any] | None = None, **options: Any) -> None:
        self.draft = draft
        super().__init__(**options)

    def to_draft(self) -> DFlashConfig:
        """Returns the config of the draft that the parameters belong to."""
        assert self.draft is not None, "EasyDeL alone makes a config without a draft, and asks it for none"
        return hf_dflash.config_from_hf(self.draft)


class Parameters(nnx.Module):
    """Holds the arrays of one node of a weights tree, by field name."""

    def __init__(self, fields: dict[str, jax.Array]) -> None:
        for name, array in fields.items():
            setattr(self, name, nnx.Param(array))

    def craft_sharding(self, **_options: Any) -> dict[str, PartitionSpec]:
        """Returns the partition of the module's own parameters, as EasyDeL asks of every module."""
        return _partition(self)


@register_module(TaskType.BASE_MODULE, config=DraftModuleConfig, model_type=MODEL_TYPE)
class DraftModule(EasyDeLBaseModule):
    """Holds the parameters of a draft in training."""

    _task_type = TaskType.BASE_MODULE
    _model_type = MODEL_TYPE
    _config_class = DraftModuleConfig

    def __init__(
        self,
        config: DraftModuleConfig,
        dtype: Any = jnp.float32,  # EasyDeL annotates jnp.dtype and is given jnp.bfloat16 and the like
        param_dtype: Any = jnp.float32,
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
        """Returns the parameters in the form in which `pipeline/model/dflash` takes them."""
        layers = tuple(DFlashLayerWeights(**_values(layer, DFlashLayerWeights)) for layer in self.layers)
        return DFlashWeights(**_values(self, DFlashWeights), layers=layers)

    def begin_with(self, weights: DFlashWeights) -> None:
        """Replaces the random weights by `weights`."""
        for node, values in [(self, weights), *zip(self.layers, weights.layers, strict=True)]:
            for name, array in _arrays(values).items():
                parameter = getattr(node, name)
                whole = np.asarray(array, parameter[...].dtype)  # every host has all of it
                parameter[...] = jax.device_put(whole, parameter[...].sharding)

    def craft_sharding(self, **_options: Any) -> dict[str, PartitionSpec]:
        """Returns the partition of the parameters outside of layers, as `Parameters` does for a layer's."""
        return _partition(self)

    @classmethod
    def can_generate(cls) -> bool:
        """Returns False: else a module that was loaded again would be saved with a generation config."""
        return False

    def flops_per_token(self, *args: Any, **kwargs: Any) -> float:
        """Returns 1, which counts nothing: EasyDeL's estimate fits no model that drafts blocks."""
        return 1.0


def _arrays(node: Any) -> dict[str, jax.Array]:
    fields = {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}
    return {name: value for name, value in fields.items() if value is not None and name != "layers"}


def _partition(module: nnx.Module) -> dict[str, PartitionSpec]:
    names = [name for name, value in vars(module).items() if isinstance(value, nnx.Param)]
    return {name: MATRICES.get(name, PartitionSpec()) for name in names}


def _values(module: nnx.Module, kind: type) -> dict[str, jax.Array]:
    found = {field.name: getattr(module, field.name, None) for field in dataclasses.fields(kind)}
    return {name: value[...] for name, value in found.items() if isinstance(value, nnx.Param)}
