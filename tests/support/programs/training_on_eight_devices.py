"""Trains a tiny draft on meshes of forced CPU devices and prints the losses of every step.

    training_on_eight_devices.py '[[[DATA, FSDP, TENSOR], {"packed": ..., "accumulation": ..., ...}], ...]'

A program of its own, because the number of devices is fixed when JAX starts. Prints one JSON line: for every case its
losses, the other metrics of the last step, the bytes of embedding and head that the first device holds, and the sizes
of all that the devices exchange in a step.
"""

import json
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from pipeline.compile.hlo import parse
from pipeline.dflash import blocks
from pipeline.model.dflash.config import DFlashConfig
from pipeline.model.hf import dflash as hf_dflash
from pipeline.model.layers.rope import Rope
from pipeline.train.easydel import environment
from pipeline.train.loss import vocab_shard
from pipeline.train.recipe import Objective, Recipe

NUM_ROWS, NUM_POSITIONS, NUM_ANCHORS, NUM_STEPS = 16, 32, 6, 5
DRAFT = DFlashConfig(
    vocab_size=53,  # no mesh divides it
    hidden_size=40,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=12,
    rope=Rope(theta=10000.0),
    tapped_layers=(0, 2),
    num_target_layers=4,
    block_size=5,
    mask_token_id=52,
)


def batch_at(step: int, *, packed: bool, teacher: bool) -> dict[str, np.ndarray]:
    random = np.random.default_rng([7, step])
    shape = (NUM_ROWS, NUM_POSITIONS)
    at = np.arange(NUM_POSITIONS)
    starts = np.where(at < 13, 0, np.where(at < 28, 13, NUM_POSITIONS)) if packed else np.zeros(NUM_POSITIONS)
    generated = (at - starts >= random.integers(2, 5, (NUM_ROWS, 1))) & (starts < NUM_POSITIONS)
    drawn = [blocks.draw_anchors(random, row, NUM_ANCHORS) for row in generated]
    token_ids = ((random.integers(0, 30, (NUM_ROWS, 1)) + at) % 31).astype(np.int32)  # can be learned
    batch = {
        "token_ids": token_ids,
        "generated": generated,
        "features": random.normal(size=(*shape, DRAFT.feature_size)).astype(ml_dtypes.bfloat16),
        "anchors": np.stack([anchors for anchors, _ in drawn]),
        "anchor_taken": np.stack([taken for _, taken in drawn]),
    }
    if packed:
        batch["starts"] = np.broadcast_to(starts, shape).astype(np.int32)
    if teacher:
        batch["teacher_hidden"] = random.normal(size=(*shape, DRAFT.hidden_size)).astype(np.float32)
    return batch


def trained(sizes: list[int], case: dict) -> dict:
    """The losses of a few steps on a mesh of `sizes`."""
    from easydel.infra.base_state import EasyDeLState  # which only now can be imported

    from pipeline.train.easydel import aot, trainer
    from pipeline.train.easydel import step as train_step
    from pipeline.train.easydel.draft_module import DraftModule, DraftModuleConfig

    data, fsdp, tensor = sizes
    packed = case.pop("packed")
    devices = np.array(jax.devices()[: data * fsdp * tensor]).reshape(data, fsdp, 1, tensor, 1)
    mesh = Mesh(devices, aot.AXES)
    recipe = Recipe(
        steps=NUM_STEPS,
        batch_sequences=NUM_ROWS,
        learning_rate=3e-3,
        warmup_ratio=0.0,
        weight_decay=0.01,
        clip_grad=1.0,
        objective=Objective(
            tuple(blocks.position_weights(DRAFT.block_size, 3.0).tolist()),
            dpace_smoothing=case.pop("dpace_smoothing", None),
            distillation=case.pop("distillation", 0.0),
        ),
        checkpoint_steps=NUM_STEPS,
        eval_steps=NUM_STEPS,
        seed=0,
        **case,
    )
    optimizer, schedule = trainer.arguments_of(Path("run"), recipe).get_optimizer_and_scheduler(NUM_STEPS)
    module_config = DraftModuleConfig(draft=hf_dflash.config_to_hf(DRAFT, "float32", {}))
    module = DraftModule(config=module_config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    state = EasyDeLState.create(step=0, model=module, tx=optimizer, init_opt_state=True)
    shardings = jax.tree_util.tree_map_with_path(lambda path, leaf: NamedSharding(mesh, aot.spec_of(path, leaf)), state)
    state = jax.device_put(state, shardings)
    random = np.random.default_rng(11)
    tables = [jnp.asarray(random.normal(size=(DRAFT.vocab_size, DRAFT.hidden_size)), jnp.float32) for _ in range(2)]
    frozen = vocab_shard.shard_tables(tables[0], tables[1].T, mesh)
    step = train_step.jitted_step(DRAFT, recipe, schedule, shardings, frozen)
    losses, compiled = [], None
    for number in range(NUM_STEPS):
        batch = batch_at(number, packed=packed, teacher=recipe.objective.distillation > 0)
        batch = jax.device_put(batch, NamedSharding(mesh, vocab_shard.ROWS_SPEC))
        compiled = compiled or step.lower(state, batch, frozen).compile()
        state, metrics = compiled(state, batch, frozen)
        losses.append(float(metrics.loss))
    others = {name: float(value) for name, value in metrics.other_metrics.items()}
    held = sum(table.addressable_shards[0].data.nbytes for table in jax.tree.leaves(frozen))
    exchanged = [list(one.shape.sizes) for one in parse(compiled.as_text()).collectives()]
    return {"losses": losses, "others": others, "held_bytes": held, "exchanged": exchanged}


if __name__ == "__main__":
    environment.prepare()
    print(json.dumps([trained(sizes, case) for sizes, case in json.loads(sys.argv[1])]))
