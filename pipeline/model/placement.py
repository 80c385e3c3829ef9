"""Which part of every array lies on which device of a mesh."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from pipeline.errors import PipelineError
from pipeline.model.dflash import weights as dflash_weights
from pipeline.model.dflash.config import DFlashConfig
from pipeline.model.dflash.model import DraftModel
from pipeline.model.dflash.weights import DFlashWeights
from pipeline.model.gpt_oss import weights as gpt_oss_weights
from pipeline.model.gpt_oss.config import GptOssConfig
from pipeline.model.gpt_oss.experts import ExpertsWeights, FusedExpertWeights
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.gpt_oss.weights import GptOssWeights, LayerWeights, WeightFormat, is_fused
from pipeline.model.layers.linear import TransposedMatrix
from pipeline.model.layers.mxfp4 import Packed
from pipeline.model.parallel.shards import DATA, EXPERT, MODEL, TENSOR, Shards

Tree = TypeVar("Tree")
CACHE = PartitionSpec(DATA, None, MODEL, None)  # rows, positions, key/value heads, head width
ROWS = PartitionSpec(DATA)
REPLICATED = PartitionSpec()

# what of a weight is split over the shards of the model: a matrix's outputs, its inputs, or all of a vector
_LAYER = {
    "query": "outputs",
    "query_bias": "vector",
    "key": "outputs",
    "key_bias": "vector",
    "value": "outputs",
    "value_bias": "vector",
    "output": "inputs",
    "sinks": "vector",
}
_WIDE = {"gate": "outputs", "gate_bias": "vector", "up": "outputs", "up_bias": "vector", "down": "inputs"}
_DRAFT_LAYER = _LAYER | {"gate": "outputs", "up": "outputs", "down": "inputs"}


def make_mesh(shards: Shards, devices: list[Any] | None = None) -> Mesh:
    """The mesh of these sizes; PipelineError when there are more or fewer devices than it has places."""
    devices = jax.devices() if devices is None else devices
    wanted = shards.data * shards.model
    if wanted != len(devices):
        raise PipelineError(
            f"mesh.data x mesh.expert x mesh.tensor is {shards.data} x {shards.expert} x {shards.tensor} = {wanted}; "
            f"there are {len(devices)} devices: change the mesh"
        )
    return Mesh(np.array(devices).reshape(shards.data, shards.expert, shards.tensor), (DATA, EXPERT, TENSOR))


def require_divisible_target(config: GptOssConfig, weight_format: WeightFormat) -> None:
    """Raise one PipelineError that lists every size of a target that the mesh of `form` does not divide."""
    shards = weight_format.shards
    model, expert = (shards.model, "mesh.expert x mesh.tensor"), (shards.expert, "mesh.expert")
    sizes = [
        ("key/value heads", config.num_key_value_heads, *model),
        ("tokens of the vocabulary", config.vocab_size, *model),
    ]
    if is_fused(config, weight_format):
        sizes.append(("rows of all experts", config.num_local_experts * config.intermediate_size, *model))
    else:
        sizes.append(("experts", config.num_local_experts, *expert))
    if not is_fused(config, weight_format) and not weight_format.packed:  # packed ones are padded
        sizes.append(("rows of an expert", config.intermediate_size, shards.tensor, "mesh.tensor"))
    _require_even("target", sizes)


def require_divisible_draft(config: DFlashConfig, shards: Shards) -> None:
    """As `require_divisible` for a draft."""
    names = {"key/value heads": config.num_key_value_heads, "rows": config.intermediate_size,
             "features": config.feature_size}  # fmt: skip
    model = (shards.model, "mesh.expert x mesh.tensor")
    _require_even("draft", [(name, size, *model) for name, size in names.items()])


def _require_even(what: str, sizes: list[tuple[str, int, int, str]]) -> None:
    uneven = [f"{part}: {size}, {name} is {count}" for part, size, count, name in sizes if size % count]
    if uneven:
        raise PipelineError(f"the mesh does not divide the {what} evenly\n  " + "\n  ".join(uneven))


def jit_sharded(
    step: Callable[..., Any], mesh: Mesh | None, in_specs: Any, out_specs: Any, *, donated: tuple[int, ...] = ()
) -> Callable[..., Any]:
    """A step that is written for one shard as one program: on every shard of a mesh, or on one device.

    What `out_specs` calls the same on all shards must be so: JAX cannot see it of gathered arrays.
    """
    if mesh is None:
        return jax.jit(step, donate_argnums=donated)
    sharded = jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return jax.jit(sharded, donate_argnums=donated)


def target_specs(target: TargetModel) -> TargetModel:
    """Returns the partition of every array of a target (or of its shapes)."""
    weights = target.weights

    def layer(one: LayerWeights) -> LayerWeights:
        experts = one.experts
        split = _split(experts, _WIDE) if isinstance(experts, FusedExpertWeights) else _experts(experts)
        return dataclasses.replace(_split(one, _LAYER), experts=split)

    specs = GptOssWeights(
        embedding=PartitionSpec(MODEL, None),
        layers=tuple(map(layer, weights.layers)),
        norm=REPLICATED,
        head=_matrix(weights.head, "outputs"),
    )
    return TargetModel(target.config, specs)


def draft_specs(draft: DraftModel) -> DraftModel:
    """Returns the partition of every array of a draft (or of its shapes)."""
    weights = draft.weights
    specs = DFlashWeights(
        fuse=_matrix(weights.fuse, "inputs"),
        context_norm=REPLICATED,
        layers=tuple(_split(layer, _DRAFT_LAYER) for layer in weights.layers),
        norm=REPLICATED,
    )
    return DraftModel(draft.config, specs)


def target_shapes(config: GptOssConfig, weight_format: WeightFormat) -> TargetModel:
    """Returns the shapes of a target's weights; nothing is allocated."""
    return TargetModel(config, gpt_oss_weights.weight_shapes(config, weight_format))


def draft_shapes(config: DFlashConfig, dtype: DTypeLike) -> DraftModel:
    """Returns the shapes of a draft's weights; nothing is allocated."""
    return DraftModel(config, dflash_weights.weight_shapes(config, dtype))


def target_shardings(config: GptOssConfig, weight_format: WeightFormat, mesh: Mesh) -> TargetModel:
    """Returns the sharding of every array of a target's weights."""
    shapes = target_shapes(config, weight_format)
    return shardings(shapes, target_specs(shapes), mesh)


def draft_shardings(config: DFlashConfig, dtype: DTypeLike, mesh: Mesh) -> DraftModel:
    """Returns the sharding of every array of a draft's weights."""
    shapes = draft_shapes(config, dtype)
    return shardings(shapes, draft_specs(shapes), mesh)


def shardings(weights: Tree, specs: Tree, mesh: Mesh) -> Tree:
    """Returns the sharding, and where it matters the layout, of every array of weights.

    What is read row by row, experts by kernels and the embedding by tokens, is laid out row by row; a TPU would choose
    what pads least, and copy the whole at every step to where it can be read.
    """

    def sharding_of(path: Any, leaf: Any, spec: PartitionSpec) -> NamedSharding | Format:
        sharding = NamedSharding(mesh, spec)
        by_rows = leaf.ndim > 2 or "embedding" in jax.tree_util.keystr(path)
        return Format(Layout(tuple(range(leaf.ndim))), sharding) if by_rows else sharding

    return jax.tree_util.tree_map_with_path(sharding_of, weights, specs)


def _experts(weights: ExpertsWeights) -> ExpertsWeights:
    rows = PartitionSpec(EXPERT, TENSOR, None)  # of all three matrices, [E, F, D]
    gate, down, bias = rows, rows, PartitionSpec(EXPERT, TENSOR)
    if isinstance(weights.gate, Packed):  # gate and up are [E, D, F]
        columns = PartitionSpec(EXPERT, None, TENSOR)
        gate, down = Packed(columns, columns), Packed(rows, rows)
    return ExpertsWeights(
        router=_matrix(weights.router, None),
        router_bias=REPLICATED,
        gate=gate,
        gate_bias=bias,
        up=gate,
        up_bias=bias,
        down=down,
        down_bias=PartitionSpec(EXPERT, None),
    )


def _split(node: Any, table: dict[str, str]) -> Any:
    """A dataclass of partitions in the place of one of weights; nodes inside it are left."""
    fields = {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}
    made = {}
    for name, value in fields.items():
        if value is None or (dataclasses.is_dataclass(value) and not isinstance(value, TransposedMatrix)):
            made[name] = value
        elif table.get(name) == "vector":
            made[name] = PartitionSpec(MODEL)
        else:
            made[name] = _matrix(value, table.get(name))
    return type(node)(**made)


def _matrix(matrix: Any, split: str | None) -> Any:
    """Returns the partition of a matrix [in, out], however it is stored."""
    specs = {"outputs": PartitionSpec(None, MODEL), "inputs": PartitionSpec(MODEL, None), None: REPLICATED}
    if isinstance(matrix, TransposedMatrix):
        return TransposedMatrix(PartitionSpec(*specs[split][::-1]))
    return specs[split]
