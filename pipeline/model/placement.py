"""Which part of every array is on which device of a mesh."""

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
Partition = Any  # a PartitionSpec, which stands where a tree of weights has an array
CACHE: Partition = PartitionSpec(DATA, MODEL, None, None)  # pages [P, G, S, 2H]
ROWS: Partition = PartitionSpec(DATA)
REPLICATED: Partition = PartitionSpec()

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
_FUSED_EXPERTS = {"gate": "outputs", "gate_bias": "vector", "up": "outputs", "up_bias": "vector", "down": "inputs"}
_DRAFT_LAYER = _LAYER | {"gate": "outputs", "up": "outputs", "down": "inputs"}


def make_mesh(shards: Shards, devices: list[Any] | None = None) -> Mesh:
    """Returns the mesh of these sizes; raises PipelineError when there are more or fewer devices than it has shards."""
    devices = jax.devices() if devices is None else devices
    wanted = shards.data * shards.model
    if wanted != len(devices):
        raise PipelineError(
            f"mesh.data x mesh.expert x mesh.tensor is {shards.data} x {shards.expert} x {shards.tensor} = {wanted}; "
            f"there are {len(devices)} devices: change the mesh"
        )
    return Mesh(np.array(devices).reshape(shards.data, shards.expert, shards.tensor), (DATA, EXPERT, TENSOR))


def require_divisible_target(config: GptOssConfig, weight_format: WeightFormat) -> None:
    """Raises one PipelineError that lists every size of a target that the mesh of its weight format does not divide."""
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
    """Raises one PipelineError that lists every size of a draft that the mesh does not divide."""
    model = (shards.model, "mesh.expert x mesh.tensor")
    sizes = [
        ("key/value heads", config.num_key_value_heads, *model),
        ("rows", config.intermediate_size, *model),
        ("features", config.feature_size, *model),
    ]
    _require_even("draft", sizes)


def _require_even(what: str, sizes: list[tuple[str, int, int, str]]) -> None:
    uneven = [f"{part}: {size}, {name} is {count}" for part, size, count, name in sizes if size % count]
    if uneven:
        raise PipelineError(f"the mesh does not divide the {what} evenly\n  " + "\n  ".join(uneven))


def jit_sharded(
    step: Callable[..., Any], mesh: Mesh | None, in_specs: Any, out_specs: Any, *, donated: tuple[int, ...] = ()
) -> Callable[..., Any]:
    """Returns a step that is written for one shard as one program: for every shard of a mesh, or for one device.

    What `out_specs` calls equal on all shards must be equal: JAX does not check it, for it cannot see it of gathered
    arrays.
    """
    if mesh is None:
        return jax.jit(step, donate_argnums=donated)
    sharded = jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return jax.jit(sharded, donate_argnums=donated)


def target_specs(target: TargetModel) -> TargetModel:
    """Returns the partition of every array of a target (or of its shapes)."""
    weights = target.weights

    def partition(layer: LayerWeights) -> LayerWeights:
        experts = layer.experts
        split = _split(experts, _FUSED_EXPERTS) if isinstance(experts, FusedExpertWeights) else _experts(experts)
        return dataclasses.replace(_split(layer, _LAYER), experts=split)

    specs = GptOssWeights(
        embedding=_partition(MODEL, None),
        layers=tuple(map(partition, weights.layers)),
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
    """Returns the sharding of every array of weights, and the layout of those that are read row by row.

    Kernels read experts and tokens read the embedding row by row. A TPU would choose the layout that pads least, and at
    every step copy the whole array to one that can be read.
    """

    def sharding_of(path: Any, leaf: Any, spec: PartitionSpec) -> NamedSharding | Format:
        sharding = NamedSharding(mesh, spec)
        by_rows = leaf.ndim > 2 or "embedding" in jax.tree_util.keystr(path)
        return Format(Layout(tuple(range(leaf.ndim))), sharding) if by_rows else sharding

    return jax.tree_util.tree_map_with_path(sharding_of, weights, specs)


def _partition(*axes: str | tuple[str, ...] | None) -> Partition:
    return PartitionSpec(*axes)


def _experts(weights: ExpertsWeights) -> ExpertsWeights:
    """Returns the partition of every array of single experts."""
    rows = _partition(EXPERT, TENSOR, None)  # of all three matrices, [E, F, D]
    gate, down, bias = rows, rows, _partition(EXPERT, TENSOR)
    if isinstance(weights.gate, Packed):  # gate and up are [E, D, F]
        columns = _partition(EXPERT, None, TENSOR)
        gate, down = Packed(columns, columns), Packed(rows, rows)
    return ExpertsWeights(
        router=_matrix(weights.router, None),
        router_bias=REPLICATED,
        gate=gate,
        gate_bias=bias,
        up=gate,
        up_bias=bias,
        down=down,
        down_bias=_partition(EXPERT, None),
    )


def _split(node: Any, table: dict[str, str]) -> Any:
    """Returns a dataclass of weights with partitions in the place of arrays; inner dataclasses stay as they are."""
    fields = {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}
    partitions: dict[str, Any] = {}
    for name, value in fields.items():
        if value is None or (dataclasses.is_dataclass(value) and not isinstance(value, TransposedMatrix)):
            partitions[name] = value
        elif table.get(name) == "vector":
            partitions[name] = PartitionSpec(MODEL)
        else:
            partitions[name] = _matrix(value, table.get(name))
    return type(node)(**partitions)


def _matrix(matrix: Any, split: str | None) -> Any:
    """Returns the partition of a matrix [in, out], however it is stored."""
    specs = {"outputs": _partition(None, MODEL), "inputs": _partition(MODEL, None), None: REPLICATED}
    if isinstance(matrix, TransposedMatrix):
        return TransposedMatrix(_partition(*specs[split][::-1]))
    return specs[split]
