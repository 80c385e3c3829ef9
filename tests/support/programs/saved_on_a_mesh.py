"""Saves a random draft as EasyDeL does, its kernels split over all devices there are.

    saved_on_a_mesh.py DIRECTORY DATAxFSDPxTENSOR

The optimizer keeps an average of the weights, here their halves.
A program of its own, because the number of devices is fixed when JAX starts.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pipeline.model.dflash.config import DFlashConfig
from pipeline.model.hf import dflash as hf_dflash
from pipeline.model.layers.rope import Rope
from pipeline.train.easydel import environment
from pipeline.train.optimizer import averaged

DRAFT = DFlashConfig(
    vocab_size=37,
    hidden_size=24,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=12,
    rope=Rope(theta=10000.0),
    tapped_layers=(0, 2),
    num_target_layers=4,
    block_size=5,
    mask_token_id=36,
    attention_bias=True,
)
AXES = ("dp", "fsdp", "ep", "tp", "sp")


def main() -> None:
    environment.prepare()
    from easydel.infra.base_state import EasyDeLState

    from pipeline.train.easydel.draft_module import MATRICES, DraftModule, DraftModuleConfig

    directory, (data, fsdp, tensor) = Path(sys.argv[1]), map(int, sys.argv[2].split("x"))
    mesh = Mesh(np.array(jax.devices()).reshape(data, fsdp, 1, tensor, 1), AXES)
    config = DraftModuleConfig(draft=hf_dflash.config_to_hf(DRAFT, "float32", {}))
    module = DraftModule(config=config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    optimizer = optax.chain(optax.adamw(1e-3), averaged(0.9))
    state = EasyDeLState.create(step=3, model=module, tx=optimizer, init_opt_state=True)

    def split(path: tuple, leaf: jax.Array) -> jax.Array:
        names = {getattr(key, "key", getattr(key, "name", None)) for key in path}
        kernel = next((name for name in MATRICES if name in names), None)
        spec = PartitionSpec() if kernel is None or leaf.ndim < 2 else MATRICES[kernel]
        return jax.device_put(leaf / 2 if "average" in names else leaf, NamedSharding(mesh, spec))

    state = jax.tree_util.tree_map_with_path(split, state)
    state.save_state(directory, float_dtype=jnp.float32, save_optimizer=True)


if __name__ == "__main__":
    main()
