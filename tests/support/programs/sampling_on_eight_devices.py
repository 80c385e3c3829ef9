"""Draws from one table of logits on meshes of eight forced CPU devices, and prints the tokens and a sum of the noise.

A program of its own, because the number of devices is fixed when JAX starts.
"""

import functools
import json
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from pipeline.model import placement
from pipeline.model.layers import sampling
from pipeline.model.layers.sampling import Sampling
from pipeline.model.parallel.shards import DATA, MODEL, Shards

ROWS, VOCAB_SIZE = 64, 400
SAMPLING = Sampling(1.3, 0.95)


def drawn(logits, keys, positions, shards):
    tokens = sampling.sample(logits, keys, positions, SAMPLING, shards)
    return tokens, sampling.noise(keys, positions, logits.shape[-1], shards)


def main() -> None:
    logits = 2 * np.random.default_rng(0).normal(size=(ROWS, VOCAB_SIZE)).astype(np.float32)
    keys = np.array([sampling.sampling_key(0, str(index)) for index in range(ROWS)], np.uint32)
    found = {}
    for sizes in ((1, 1, 1), (1, 8, 1), (2, 2, 2)):
        shards = Shards(*sizes)
        step = functools.partial(drawn, shards=shards)
        if shards.is_split:
            specs = (P(DATA, MODEL), P(DATA), P(DATA))
            step = jax.shard_map(
                step,
                mesh=placement.make_mesh(shards),
                in_specs=specs,
                out_specs=(P(DATA), P(DATA, MODEL)),
                check_vma=False,
            )
        tokens, noise = jax.device_get(jax.jit(step)(logits, keys, np.arange(ROWS, dtype=np.int32)))
        found["x".join(map(str, sizes))] = {"tokens": tokens.tolist(), "noise": float(noise.sum(dtype=np.float64))}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
