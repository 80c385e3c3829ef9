"""The training step for devices that need not be there, by the shapes of what it is given."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from easydel.infra.base_state import EasyDeLState
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pipeline.model import hf_draft
from pipeline.model.draft import DraftConfig
from pipeline.model.linear import Transposed
from pipeline.train import trainer
from pipeline.train.draft_module import KERNELS, DraftModule, DraftModuleConfig
from pipeline.train.recipe import Recipe

AXES = ("dp", "fsdp", "ep", "tp", "sp")  # EasyDeL's mesh


def lowered_step(
    config: DraftConfig, recipe: Recipe, devices: Sequence[Any], *, num_positions: int, num_anchors: int
) -> Any:
    """The traced step, ready to be compiled, with state and batch split over all devices (`fsdp`).

    A batch has `recipe.batch_sequences` rows of `num_positions` tokens and `num_anchors` blocks.
    """
    mesh = Mesh(np.array(devices).reshape(1, len(devices), 1, 1, 1), AXES)
    module_config = DraftModuleConfig(draft=hf_draft.config_to_hf(config, "float32", {}))
    optimizer, schedule = trainer.arguments_of(Path("run"), recipe).get_optimizer_and_scheduler(recipe.steps)

    def new_state() -> EasyDeLState:
        module = DraftModule(
            config=module_config, dtype=recipe.dtype, param_dtype=jnp.float32, rngs=nnx.Rngs(recipe.seed)
        )
        return EasyDeLState.create(step=0, model=module, tx=optimizer, init_opt_state=True)

    state = jax.eval_shape(new_state)
    places = jax.tree_util.tree_map_with_path(lambda path, leaf: NamedSharding(mesh, _spec(path, leaf)), state)
    rows, everywhere = NamedSharding(mesh, trainer.BATCH_SPEC), NamedSharding(mesh, PartitionSpec())
    step = trainer.jitted_step(config, recipe, schedule, places, rows, everywhere)
    return step.lower(
        jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), state, places),
        _batch(config, recipe, num_positions, num_anchors, rows),
        _frozen(config, recipe, everywhere),
    )


def _spec(path: Any, leaf: Any) -> PartitionSpec:
    """Of a parameter, or of what the optimizer keeps of it under the same name."""
    names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    return KERNELS.get(names[-1], PartitionSpec()) if names and leaf.ndim == 2 else PartitionSpec()


def _batch(
    config: DraftConfig, recipe: Recipe, num_positions: int, num_anchors: int, place: NamedSharding
) -> dict[str, jax.ShapeDtypeStruct]:
    texts, blocks = (recipe.batch_sequences, num_positions), (recipe.batch_sequences, num_anchors)
    fields = {
        "token_ids": (texts, jnp.int32),
        "generated": (texts, jnp.bool_),
        "features": ((*texts, config.feature_size), jnp.bfloat16),
        "anchors": (blocks, jnp.int32),
        "anchor_taken": (blocks, jnp.bool_),
    }
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for name, (shape, dtype) in fields.items()}


def _frozen(config: DraftConfig, recipe: Recipe, place: NamedSharding) -> tuple[jax.ShapeDtypeStruct, Transposed]:
    rows = jax.ShapeDtypeStruct((config.vocab_size, config.hidden_size), recipe.dtype, sharding=place)
    return rows, Transposed(rows)
