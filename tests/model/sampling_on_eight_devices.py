"""Draws from one table of logits on meshes of eight forced CPU devices, and answers prompts with a random target.

Prints the tokens, a sum of the noise and the answers. A program of its own, because the number of devices is fixed
when JAX starts.
"""

import functools
import json
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np
import tiny_models
from jax.sharding import PartitionSpec as P

from pipeline.model import placement, sampling
from pipeline.model.execution import Execution
from pipeline.model.gpt_oss_config import GptOssConfig
from pipeline.model.gpt_oss_weights import WeightsForm, random_weights
from pipeline.model.sampling import Sampling
from pipeline.model.sharding import DATA, MODEL, Shards
from pipeline.serve.engine import Engine
from pipeline.serve.scheduler import Request

ROWS, VOCAB_SIZE = 64, 400
HOW = Sampling(1.3, 0.95)
SIZES = GptOssConfig.from_hf(tiny_models.SPLIT_TARGET)


def drawn(logits, keys, positions, shards):
    tokens = sampling.sample(logits, keys, positions, HOW, shards)
    return tokens, sampling.noise(keys, positions, logits.shape[-1], shards)


def answers(shards):
    """Eight sampled answers of a random target, spread out to have something to choose from."""
    weights = random_weights(SIZES, jax.random.key(0))
    weights = jax.tree.map(lambda leaf: leaf * 3, weights)
    mesh = placement.make_mesh(shards) if shards.split else None
    if mesh is not None:
        weights = jax.device_put(weights, placement.target_places(SIZES, WeightsForm(shards=shards), mesh))
    engine = Engine(
        weights,
        SIZES,
        stop_token_ids=(1,),
        slots=8,
        max_length=32,
        prefill_chunk=4,
        sampling=HOW,
        run=Execution(shards),
        mesh=mesh,
    )
    requests = [
        Request(
            request_id=str(index),
            prompt_ids=(3, 4, 5, 6, 7, 8)[: 1 + index % 6],
            max_new_tokens=12,
            key=sampling.key_of(0, str(index)),
        )
        for index in range(11)
    ]
    found = {int(one.request_id): one.token_ids for one in engine.generate(requests)}
    return [found[index] for index in range(len(requests))]


def main() -> None:
    logits = 2 * np.random.default_rng(0).normal(size=(ROWS, VOCAB_SIZE)).astype(np.float32)
    keys = np.array([sampling.key_of(0, str(index)) for index in range(ROWS)], np.uint32)
    told = {}
    for sizes in ((1, 1, 1), (1, 8, 1), (2, 2, 2)):
        shards = Shards(*sizes)
        step = functools.partial(drawn, shards=shards)
        if shards.split:
            specs = (P(DATA, MODEL), P(DATA), P(DATA))
            step = jax.shard_map(
                step,
                mesh=placement.make_mesh(shards),
                in_specs=specs,
                out_specs=(P(DATA), P(DATA, MODEL)),
                check_vma=False,
            )
        tokens, noise = jax.device_get(jax.jit(step)(logits, keys, np.arange(ROWS, dtype=np.int32)))
        told["x".join(map(str, sizes))] = {"tokens": tokens.tolist(), "noise": float(noise.sum(dtype=np.float64))}
        if sizes != (1, 8, 1):  # an engine takes long to compile
            told["x".join(map(str, sizes))]["answers"] = answers(shards)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
