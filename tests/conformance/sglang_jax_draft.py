"""What sglang-jax makes of a draft: its own config parser, model, weight loader and arithmetic, in float32.

    sglang_jax_draft.py --draft DIRECTORY --inputs IN.npz --outputs OUT.npz

in:  features [T, L*D], noise_embedding [K, D]
out: hidden [K, D], the block at positions T..T+K-1 after the final norm

Prints one JSON line: what the parser read, the base of RoPE, and of the loader the tensors it found no file for and the
parameters that it left untouched. Its Pallas attention runs on TPUs alone, so attention is written out here.
"""

import argparse
import json
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import safe_open
from sgl_jax.srt.configs.model_config import ModelConfig
from sgl_jax.srt.models.dflash import DFlashDraftModel
from sgl_jax.srt.speculative.dflash_util import parse_dflash_draft_config
from sgl_jax.srt.utils.mesh_utils import create_device_mesh


class Heard(logging.Handler):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


class OverContext:
    """Non-causal attention of a block over the context's keys and values and its own, in place of RadixAttention."""

    def __init__(self, keys, values, scaling):
        self.keys, self.values, self.scaling = keys, values, scaling

    def __call__(self, queries, keys, values, *_):
        queries, keys, values = (np.asarray(array) for array in (queries, keys, values))
        keys, values = np.concatenate([self.keys, keys]), np.concatenate([self.values, values])
        group = queries.shape[1] // keys.shape[1]
        keys, values = (np.repeat(array, group, axis=1) for array in (keys, values))
        scores = np.exp(np.einsum("knh,snh->nks", queries, keys) * self.scaling)
        mixed = np.einsum("nks,snh->knh", scores / scores.sum(-1, keepdims=True), values)
        return jnp.asarray(mixed.reshape(len(mixed), -1)), None


class Block:
    """The two fields of a ForwardBatch that the draft's backbone reads."""

    def __init__(self, embeddings, positions):
        self.input_embedding, self.positions = embeddings, positions


def stored_names(directory):
    names = set()
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as opened:
            names |= set(opened.keys())
    return names


def spoiled(array):
    return jnp.full_like(array, jnp.nan)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draft", type=Path, required=True)
    parser.add_argument("--inputs", type=Path, required=True)
    parser.add_argument("--outputs", type=Path, required=True)
    arguments = parser.parse_args()

    heard = Heard()
    logging.getLogger("sgl_jax").addHandler(heard)
    logging.getLogger("sgl_jax").setLevel(logging.INFO)
    read = parse_dflash_draft_config(str(arguments.draft))
    config = ModelConfig(str(arguments.draft), dtype="float32", is_draft_model=True)
    mesh = create_device_mesh(ici_parallelism=[1, 1], dcn_parallelism=[1, 1])
    with jax.set_mesh(mesh):
        model = DFlashDraftModel(config.hf_config, mesh, jnp.float32)
        state = nnx.state(model)
        nnx.update(model, jax.tree.map(spoiled, state))  # what is not loaded stays so
        model.load_weights(config)
        loaded = jax.tree.map(lambda array: bool(jnp.isfinite(array).all()), nnx.state(model))
        untouched = [jax.tree_util.keystr(path) for path, whole in jax.tree.leaves_with_path(loaded) if not whole]
        hidden = block(model, **np.load(arguments.inputs))
    np.savez(arguments.outputs, hidden=hidden)
    told = {
        "block_size": read.block_size,
        "target_layer_ids": read.target_layer_ids,
        "mask_token_id": read.mask_token_id,
        "rope_theta": model.model.layers[0].self_attn.rotary_emb.base,
        "no_file_found": [line for line in heard.lines if "No file found" in line],
        "num_parameters": len(jax.tree.leaves(loaded)),
        "untouched": untouched,
        "num_tensors": len(stored_names(arguments.draft)),
    }
    print(json.dumps(told))


def block(model, features, noise_embedding):
    num_context = len(features)
    context = model.materialize_kv(jnp.asarray(features), jnp.arange(num_context))
    for layer, (keys, values) in zip(model.model.layers, context, strict=True):
        layer.self_attn.attn = OverContext(np.asarray(keys), np.asarray(values), layer.self_attn.scaling)
    positions = num_context + jnp.arange(len(noise_embedding))
    hidden, _ = model.model(Block(jnp.asarray(noise_embedding), positions), None)
    return np.asarray(hidden)


if __name__ == "__main__":
    main()
