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

from pipeline.artifacts import PipelineError
from pipeline.model import hf_draft
from pipeline.model.draft import DraftConfig
from pipeline.model.linear import Transposed
from pipeline.train import trainer, vocabulary
from pipeline.train.draft_module import KERNELS, DraftModule, DraftModuleConfig
from pipeline.train.recipe import Recipe, Split

AXES = ("dp", "fsdp", "ep", "tp", "sp")  # EasyDeL's mesh


def lowered_step(
    config: DraftConfig,
    recipe: Recipe,
    devices: Sequence[Any],
    *,
    num_positions: int,
    num_anchors: int,
    packed: bool = False,
) -> Any:
    """The traced step, ready to be compiled, with state and batch split over all devices as `recipe.split` says.

    A batch has `recipe.batch_sequences` rows of `num_positions` tokens and `num_anchors` blocks; `packed` rows hold
    several sequences each.
    """
    mesh = _mesh(recipe.split, devices)
    module_config = DraftModuleConfig(draft=hf_draft.config_to_hf(config, "float32", {}))
    optimizer, schedule = trainer.arguments_of(Path("run"), recipe).get_optimizer_and_scheduler(recipe.steps)

    def new_state() -> EasyDeLState:
        module = DraftModule(
            config=module_config, dtype=recipe.dtype, param_dtype=jnp.float32, rngs=nnx.Rngs(recipe.seed)
        )
        return EasyDeLState.create(step=0, model=module, tx=optimizer, init_opt_state=True)

    state = jax.eval_shape(new_state)
    places = jax.tree_util.tree_map_with_path(lambda path, leaf: NamedSharding(mesh, spec_of(path, leaf)), state)
    frozen = _frozen(config, recipe, mesh)
    step = trainer.jitted_step(config, recipe, schedule, places, frozen[1], mesh)
    return step.lower(
        jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), state, places),
        _batch(config, recipe, num_positions, num_anchors, NamedSharding(mesh, vocabulary.ROWS_SPEC), packed=packed),
        frozen,
    )


def _mesh(split: Split, devices: Sequence[Any]) -> Mesh:
    try:
        return Mesh(np.array(devices).reshape(split.data, split.fsdp, 1, split.tensor, 1), AXES)
    except ValueError as error:
        raise PipelineError(
            f"train.data x train.fsdp x train.tensor is {split.data} x {split.fsdp} x {split.tensor} (-1: what the "
            f"others leave); that is no way to share out {len(devices)} devices"
        ) from error


def spec_of(path: Any, leaf: Any) -> PartitionSpec:
    """Of a parameter, or of what the optimizer keeps of it under the same name."""
    names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    return KERNELS.get(names[-1], PartitionSpec()) if names and leaf.ndim == 2 else PartitionSpec()


def _batch(
    config: DraftConfig, recipe: Recipe, num_positions: int, num_anchors: int, place: NamedSharding, *, packed: bool
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
    if recipe.distillation:
        fields["teacher_hidden"] = ((*texts, config.hidden_size), jnp.bfloat16)
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for name, (shape, dtype) in fields.items()}


def _frozen(config: DraftConfig, recipe: Recipe, mesh: Mesh) -> tuple[jax.ShapeDtypeStruct, Transposed]:
    """Embedding and head as `vocabulary.share_out` places them."""
    size = config.vocab_size + -config.vocab_size % vocabulary.num_shares(mesh)
    shape = (size, config.hidden_size)
    place, _ = vocabulary.places(Transposed(shape), mesh)
    table = jax.ShapeDtypeStruct(shape, recipe.dtype, sharding=place)
    return table, Transposed(table)
