"""Builds the jitted training step."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from easydel.infra.base_state import EasyDeLState
from easydel.infra.loss_utils import LossMetrics
from easydel.trainers.training_utils import update_metrics, update_state_respectfully
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from pipeline.model.dflash.config import DFlashConfig
from pipeline.model.dflash.model import DraftModel
from pipeline.train import fsdp
from pipeline.train.accumulation import accumulated, require_divisible_batch
from pipeline.train.easydel.draft_module import MATRICES, DraftModule
from pipeline.train.loss import vocab_shard
from pipeline.train.loss.objective import LossSums, TrainBatch, draft_sums, normaliser
from pipeline.train.loss.vocab_shard import FrozenTables
from pipeline.train.recipe import Recipe


def jitted_step(
    config: DFlashConfig, recipe: Recipe, schedule: Callable[[Array], Array], state: Any, tables: FrozenTables
) -> Any:
    """Returns the training step, jitted: state, batch and the target's tables in, the donated state and metrics out.

    `state` has the sharding of every array of the state; of `tables` the shapes and the mesh count. Raises
    PipelineError when the rows cannot be split evenly over devices and parts.
    """
    mesh = tables.mesh
    assert mesh is not None, "EasyDeL trains on a mesh, of one device too"
    require_divisible_batch(recipe.batch_sequences, recipe.accumulation, data=mesh.shape["dp"], fsdp=mesh.shape["fsdp"])
    embedding: Any  # shardings stand where the arrays do
    head: Any
    embedding, head = vocab_shard.table_shardings(tables.head, mesh)
    frozen = dataclasses.replace(tables, embedding=embedding, head=head)
    return jax.jit(
        functools.partial(_train_step, config, recipe, schedule, _matrix_specs(state)),
        in_shardings=(state, NamedSharding(mesh, vocab_shard.ROWS_SPEC), frozen),
        out_shardings=(state, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=(0,),
    )


def _matrix_specs(state: Any) -> dict[str, PartitionSpec]:
    """Returns the partition of the matrices of each name, which is the same in every layer."""
    found = {}
    for path, sharding in jax.tree_util.tree_leaves_with_path(state.graphstate):
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        if names and names[-1] in MATRICES:
            found[names[-1]] = sharding.spec
    return found


def _train_step(
    config: DFlashConfig,
    recipe: Recipe,
    schedule: Callable[[Array], Array],
    specs: dict[str, PartitionSpec],
    state: EasyDeLState,
    batch: dict[str, Array],
    tables: FrozenTables,
) -> tuple[EasyDeLState, LossMetrics]:
    objective, mesh = recipe.objective, tables.mesh
    assert mesh is not None, "EasyDeL trains on a mesh, of one device too"
    total = normaliser(config, TrainBatch(**batch), objective)

    def loss_of(parameters: Any, part: TrainBatch) -> tuple[Array, LossSums]:
        module = state.merge(parameters)
        assert isinstance(module, DraftModule), "the state is that of a draft"
        weights = jax.tree.map(lambda array: array.astype(recipe.dtype), module.weights())  # the arithmetic's precision
        sums = draft_sums(
            DraftModel(config, weights),
            tables,
            part,
            objective,
            total,
            remat=recipe.remat,
            gather=functools.partial(fsdp.gather_matrices, mesh=mesh, specs=specs),
        )
        return sums.loss, sums

    differentiate = jax.value_and_grad(loss_of, has_aux=True)
    (loss, sums), gradients = accumulated(
        differentiate, state.graphstate, TrainBatch(**batch), recipe.accumulation, mesh
    )
    metrics = LossMetrics(loss=loss, other_metrics=sums.metrics())
    metrics = update_metrics(metrics, schedule, state.step, gradients)
    return update_state_respectfully(state, gradients, None, metrics), metrics
