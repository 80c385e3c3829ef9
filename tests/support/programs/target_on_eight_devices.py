"""Runs a tiny target and draft on meshes of eight forced CPU devices and prints how far each is from one device.

    target_on_eight_devices.py ROOT '[[[DATA, EXPERT, TENSOR], FORM], ...]'

A program of its own, because the number of devices is fixed when JAX starts. Prints one JSON line: for every mesh and
form of the weights the largest difference of logits of prefill, decode and verify, and of the draft's.
"""

import dataclasses
import functools
import json
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from pipeline.model import placement
from pipeline.model.dflash import forward as dflash
from pipeline.model.dflash import weights as dflash_weights
from pipeline.model.dflash.config import DFlashConfig
from pipeline.model.dflash.model import DraftModel
from pipeline.model.gpt_oss import forward as gpt_oss
from pipeline.model.gpt_oss.config import GptOssConfig
from pipeline.model.gpt_oss.weights import WeightFormat
from pipeline.model.hf.directory import read_config, read_draft, read_draft_config, read_target, save_draft
from pipeline.model.layers import kv_pages
from pipeline.model.layers.rope import Rope
from pipeline.model.parallel.execution import Execution
from pipeline.model.parallel.shards import MODEL, Shards

NUM_ROWS, PROMPT, BLOCK, NUM_POSITIONS, PAGE = 8, 11, 5, 32, 16
DRAFT = DFlashConfig(
    vocab_size=0,
    hidden_size=0,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=12,
    rope=Rope(theta=1e6),
    tapped_layers=(0, 1),
    num_target_layers=3,  # no runtime taps the last layer: this one is said to have another
    block_size=BLOCK,
    mask_token_id=7,
)


def passes(target, draft, ids, tables, cache, draft_cache, *, execution):
    """Logits [B, V] of prefill, [B, V] of a step, [B, K, V] of a block, and the draft's [B, K, V]."""
    start = jnp.zeros(len(ids), jnp.int32)
    taps = draft.config.tapped_layers
    logits = []

    def gathered(hidden):
        local = gpt_oss.logits(target.weights, hidden)
        axis = local.ndim - 1
        return jax.lax.all_gather(local, MODEL, axis=axis, tiled=True) if execution.shards.is_split else local

    for first, last in ((0, PROMPT), (PROMPT, PROMPT + 1), (PROMPT + 1, PROMPT + 1 + BLOCK)):
        at = start + first
        out = gpt_oss.forward(target, ids[:, first:last], at, cache, taps, tables=tables, execution=execution)
        positions = at[:, None] + jnp.arange(last - first)
        new = dflash.context(draft, out.features, positions, execution.shards)
        cache, draft_cache = out.cache, dflash.extend(draft_cache, new, tables.whole, at)
        logits.append(gathered(out.hidden))
    block = gpt_oss.embed(target.weights, ids[:, -BLOCK:], execution.shards)
    hidden = dflash.denoise(draft, block, start + PROMPT + 1 + BLOCK, draft_cache, tables.whole, execution)
    tokens = gpt_oss.next_tokens(target.weights, hidden, execution.shards)
    return *logits, gathered(hidden), tokens


def outputs_of(directory, draft_directory, ids, weight_format, shards):
    """The passes' outputs with weights read from files to where they belong."""
    execution = Execution(shards, max_per_expert_tokens=ids.shape[0] * 2)  # prefill is grouped, decode is not
    config = GptOssConfig.from_hf(read_config(directory))
    sizes = read_draft_config(draft_directory)
    weight_format = dataclasses.replace(weight_format, shards=shards)
    of_shard = kv_pages.consecutive_tables(NUM_ROWS // shards.data, NUM_POSITIONS, PAGE)
    tables = jax.tree.map(lambda table: np.tile(table, (shards.data, 1)), of_shard)  # pages are numbered by shard
    num_pages = tables.whole.size + shards.data - 1  # each shard has a spare one
    cache = gpt_oss.empty_cache(config, num_pages, num_pages, PAGE, jnp.float32)
    draft_cache = dflash.empty_cache(sizes, num_pages, PAGE, jnp.float32)
    step = functools.partial(passes, execution=execution)
    if not shards.is_split:
        target, draft = read_target(directory, weight_format), read_draft(draft_directory, "float32")
        return jax.device_get(jax.jit(step)(target, draft, ids, tables, cache, draft_cache))
    mesh = placement.make_mesh(shards)
    placement.require_divisible_target(config, weight_format)
    placement.require_divisible_draft(sizes, shards)
    target = read_target(directory, weight_format, placement.target_shardings(config, weight_format, mesh))
    draft = read_draft(draft_directory, "float32", placement.draft_shardings(sizes, "float32", mesh))
    specs = (placement.target_specs(target), placement.draft_specs(draft))
    caches = [jax.tree.map(lambda _: placement.CACHE, one) for one in (cache, draft_cache)]
    rows = placement.ROWS
    sharded = jax.shard_map(
        step, mesh=mesh, in_specs=(*specs, rows, rows, *caches), out_specs=P("data"), check_vma=False
    )
    return jax.device_get(jax.jit(sharded)(target, draft, ids, tables, cache, draft_cache))


def main() -> None:
    root, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    found = {}
    for name in dict.fromkeys(form for _, form in cases):
        packed = name == "packed"
        directory, draft_directory = root / name, root / f"{name}-draft"
        config = GptOssConfig.from_hf(read_config(directory))
        sizes = dataclasses.replace(DRAFT, vocab_size=config.vocab_size, hidden_size=config.hidden_size)
        draft_directory.mkdir(exist_ok=True)
        save_draft(draft_directory, DraftModel(sizes, dflash_weights.random_weights(sizes, jax.random.key(1))), {})
        ids = np.random.default_rng(0).integers(0, config.vocab_size, (NUM_ROWS, PROMPT + 1 + BLOCK)).astype(np.int32)
        weight_format = WeightFormat(packed=packed)
        alone = outputs_of(directory, draft_directory, ids, weight_format, Shards())
        for mesh in [size for size, form in cases if form == name]:
            split = outputs_of(directory, draft_directory, ids, weight_format, Shards(*mesh))
            found["x".join(map(str, mesh)) + f" {name}"] = {
                "prefill": float(np.abs(split[0] - alone[0]).max()),
                "decode": float(np.abs(split[1] - alone[1]).max()),
                "verify": float(np.abs(split[2] - alone[2]).max()),
                "draft": float(np.abs(split[3] - alone[3]).max()),
                "tokens": int((np.asarray(split[4]) != np.asarray(alone[4])).sum()),
                "deviation": float(np.std(alone[2])),
            }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
