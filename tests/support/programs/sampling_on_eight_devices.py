"""Chooses tokens by every rule on meshes of eight forced CPU devices; prints tokens, a sum of noise, log probabilities.

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
from pipeline.model.layers import sampling, token_rules
from pipeline.model.layers.token_rules import TokenHistory
from pipeline.model.parallel.shards import DATA, MODEL, Shards

ROWS, WIDTH, VOCAB_SIZE = 64, 3, 400


def rules_of(keys):
    """Every rule in some of the rows, and greedy rows between them."""
    random = np.random.default_rng(1)
    rules = jax.tree.map(np.array, token_rules.greedy_rules(ROWS))
    rules.keys[:] = keys
    rules.temperature[:] = random.choice([0.0, 0.7, 1.3], ROWS)
    rules.top_p[:] = random.choice([1.0, 0.8], ROWS)
    rules.top_k[:] = random.choice([0, 30], ROWS)
    rules.min_p[:] = random.choice([0.0, 0.02], ROWS)
    rules.repetition[:] = random.choice([1.0, 1.2], ROWS)
    rules.frequency[:] = random.choice([0.0, 0.6], ROWS)
    rules.presence[:] = random.choice([0.0, -0.4], ROWS)
    rules.stop_ids[:, :4] = random.integers(0, VOCAB_SIZE, (ROWS, 4))
    rules.least_length[:] = random.choice([0, ROWS], ROWS)
    rules.bias_ids[:, :5] = random.integers(0, VOCAB_SIZE, (ROWS, 5))
    rules.biases[:, :5] = random.normal(size=(ROWS, 5))
    rules.num_logprobs[:] = random.choice([-1, 3], ROWS)
    return rules


def drawn(logits, rules, history, block, start, shards):
    tokens = token_rules.choose(logits, rules, history, block, start, shards)
    history = token_rules.with_tokens(history, rules, tokens, start % WIDTH, shards)
    again = token_rules.choose(logits, rules, history, block, start + WIDTH, shards)
    found = token_rules.log_probs(logits, tokens, rules, shards)
    noise = sampling.noise(rules.keys, start, logits.shape[-1], shards)
    return tokens, again, noise, found


def main() -> None:
    random = np.random.default_rng(0)
    logits = 2 * random.normal(size=(ROWS, WIDTH, VOCAB_SIZE)).astype(np.float32)
    keys = np.array([sampling.sampling_key(0, str(index)) for index in range(ROWS)], np.uint32)
    history = TokenHistory(
        random.integers(0, 3, (ROWS, VOCAB_SIZE)).astype(np.int32), random.random((ROWS, VOCAB_SIZE)) < 0.3
    )
    block = random.integers(0, VOCAB_SIZE, (ROWS, WIDTH)).astype(np.int32)
    arguments = (logits, rules_of(keys), history, block, np.arange(ROWS, dtype=np.int32))
    found = {}
    for sizes in ((1, 1, 1), (1, 8, 1), (2, 2, 2)):
        shards = Shards(*sizes)
        step = functools.partial(drawn, shards=shards)
        if shards.is_split:
            rows, split = P(DATA), P(DATA, MODEL)
            step = jax.shard_map(
                step,
                mesh=placement.make_mesh(shards),
                in_specs=(P(DATA, None, MODEL), rows, split, rows, rows),
                out_specs=(rows, rows, split, rows),
                check_vma=False,
            )
        tokens, again, noise, log_probs = jax.device_get(jax.jit(step)(*arguments))
        found["x".join(map(str, sizes))] = {
            "tokens": [*tokens.tolist(), *again.tolist()],
            "noise": float(noise.sum(dtype=np.float64)),
            "chosen": log_probs.chosen.tolist(),
            "top_ids": log_probs.top_ids.tolist(),
            "top": log_probs.top.tolist(),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
