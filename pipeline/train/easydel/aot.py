"""Lowers the training step for devices that need not be there, from the shapes of its arguments alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from easydel.infra.base_state import EasyDeLState
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pipeline.errors import PipelineError
from pipeline.model.dflash.config import DFlashConfig
from pipeline.model.hf import dflash as hf_dflash
from pipeline.model.layers.linear import TransposedMatrix
from pipeline.train.easydel import step as step_module
from pipeline.train.easydel import trainer
from pipeline.train.easydel.draft_module import MATRICES, DraftModule, DraftModuleConfig
from pipeline.train.loss import vocab_shard
from pipeline.train.loss.vocab_shard import FrozenTables
from pipeline.train.recipe import DeviceSplit, Recipe

AXES = ("dp", "fsdp", "ep", "tp", "sp")  # EasyDeL's mesh


def lower_train_step(
    config: DFlashConfig,
    recipe: Recipe,
    devices: Sequence[Any],
    *,
    num_positions: int,
    num_anchors: int,
    packed: bool = False,
) -> Any:
    """Returns the lowered step, ready to be compiled, with state and batch split over all devices by `recipe.split`.

    A batch has `recipe.batch_sequences` rows of `num_positions` tokens and `num_anchors` blocks; `packed` rows hold
    several sequences each.
    """
    mesh = _mesh(recipe.split, devices)
    module_config = DraftModuleConfig(draft=hf_dflash.config_to_hf(config, "float32", {}))
    optimizer, schedule = trainer.arguments_of(Path("run"), recipe).get_optimizer_and_scheduler(recipe.steps)

    def create_state() -> EasyDeLState:
        module = DraftModule(
            config=module_config, dtype=recipe.dtype, param_dtype=jnp.float32, rngs=nnx.Rngs(recipe.seed)
        )
        return EasyDeLState.create(step=0, model=module, tx=optimizer, init_opt_state=True)

    state = jax.eval_shape(create_state)
    shardings = jax.tree_util.tree_map_with_path(lambda path, leaf: NamedSharding(mesh, spec_of(path, leaf)), state)
    tables = _tables(config, recipe, mesh)
    step = step_module.jitted_step(config, recipe, schedule, shardings, tables)
    return step.lower(
        jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state, shardings
        ),
        _batch(config, recipe, num_positions, num_anchors, NamedSharding(mesh, vocab_shard.ROWS_SPEC), packed=packed),
        tables,
    )


def _mesh(split: DeviceSplit, devices: Sequence[Any]) -> Mesh:
    try:
        return Mesh(np.array(devices).reshape(split.data, split.fsdp, 1, split.tensor, 1), AXES)
    except ValueError as error:
        raise PipelineError(
            f"train.mesh.data x train.mesh.fsdp x train.mesh.tensor is {split.data} x {split.fsdp} x {split.tensor} "
            f"(-1: what the others leave); that is no way to share out {len(devices)} devices"
        ) from error


def spec_of(path: Any, leaf: Any) -> PartitionSpec:
    """Returns the partition of a parameter, or of what the optimizer stores for it under the same name."""
    names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    return MATRICES.get(names[-1], PartitionSpec()) if names and leaf.ndim == 2 else PartitionSpec()


def _batch(
    config: DFlashConfig, recipe: Recipe, num_positions: int, num_anchors: int, sharding: NamedSharding, *, packed: bool
) -> dict[str, jax.ShapeDtypeStruct]:
    texts, blocks = (recipe.batch_sequences, num_positions), (recipe.batch_sequences, num_anchors)
    fields = {
        "token_ids": (texts, jnp.int32),
        "generated": (texts, jnp.bool_),
        "features": ((*texts, config.feature_size), jnp.bfloat16),
        "anchors": (blocks, jnp.int32),
        "anchor_taken": (blocks, jnp.bool_),
    }
    if packed:
        fields["starts"] = (texts, jnp.int32)
    if recipe.objective.distillation:
        fields["teacher_hidden"] = ((*texts, config.hidden_size), jnp.bfloat16)
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, (shape, dtype) in fields.items()}


def _tables(config: DFlashConfig, recipe: Recipe, mesh: Mesh) -> FrozenTables:
    """Returns the shapes of embedding and head as `vocab_shard.shard_tables` shards them."""
    size = config.vocab_size + -config.vocab_size % vocab_shard.num_vocab_shards(mesh)
    shape = (size, config.hidden_size)
    sharding = NamedSharding(mesh, vocab_shard.EMBEDDING_SPEC)  # that of a head stored as [V, D] too
    table: Any = jax.ShapeDtypeStruct(shape, recipe.dtype, sharding=sharding)
    return FrozenTables(table, TransposedMatrix(table), config.vocab_size, mesh)
