"""Tokens are drawn as numpy's softmax says, cut exactly at the nucleus, by key, position and token id alone."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipeline.model.layers import token_rules
from pipeline.model.layers.sampling import noise, nucleus, sampling_key
from pipeline.model.layers.token_rules import TokenHistory
from pipeline.model.parallel.shards import UNSHARDED
from tests.support.paths import PROGRAMS, ROOT

VOCAB_SIZE, NUM_DRAWS = 37, 40_000
CHI_SQUARE_LIMIT = 80.0  # of 36 degrees of freedom, passed by chance once in 30,000 times


def softmax(logits):
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def nucleus_by_sorting(logits, top_p):
    """The fewest tokens, the likeliest first, that hold `top_p`."""
    order = np.argsort(-logits)
    before = np.cumsum(softmax(logits)[order]) - softmax(logits)[order]
    return np.isin(np.arange(len(logits)), order[before < top_p])


def drawn(logits, temperature, top_p, num_draws=NUM_DRAWS):
    keys = jnp.asarray([sampling_key(7, str(index)) for index in range(num_draws)], jnp.uint32)
    rows = jnp.broadcast_to(jnp.asarray(logits), (num_draws, 1, len(logits)))
    rules = dataclasses.replace(
        token_rules.greedy_rules(num_draws),
        temperature=jnp.full(num_draws, temperature),
        top_p=jnp.full(num_draws, top_p),
        keys=keys,
    )
    shape = (num_draws, len(logits))
    history = TokenHistory(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool))
    block, start = jnp.zeros((num_draws, 1), jnp.int32), jnp.arange(num_draws) % 50
    choose = jax.jit(token_rules.choose, static_argnums=5)
    return np.asarray(choose(rows, rules, history, block, start, UNSHARDED))[:, 0]


@pytest.fixture(scope="module")
def logits():
    return np.random.default_rng(0).normal(size=VOCAB_SIZE).astype(np.float32) * 2


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_draws_are_distributed_as_the_softmax_of_the_nucleus(logits, temperature, top_p):
    scaled = logits / np.float32(temperature)
    wanted = np.where(nucleus_by_sorting(scaled, top_p), softmax(scaled), 0)
    wanted = NUM_DRAWS * wanted / wanted.sum()
    found = np.bincount(drawn(logits, temperature, top_p), minlength=VOCAB_SIZE)
    assert not found[wanted == 0].any()
    often = wanted >= 5  # what is rarer counts as one
    found = np.append(found[often], found[~often].sum())
    wanted = np.append(wanted[often], wanted[~often].sum())
    chi_square = np.sum((found - wanted)[wanted > 0] ** 2 / wanted[wanted > 0])
    assert chi_square < CHI_SQUARE_LIMIT


def test_draws_at_neighbouring_positions_and_of_neighbouring_tokens_are_independent():
    keys = jnp.asarray([sampling_key(0, "text")] * 4000, jnp.uint32)
    found = np.asarray(noise(keys, jnp.arange(4000), 5, UNSHARDED))
    assert np.abs(np.corrcoef(found.T) - np.eye(5)).max() < 0.08
    assert abs(np.corrcoef(found[1:, 0], found[:-1, 0])[0, 1]) < 0.08


def test_noise_is_gumbels_of_the_bits_that_jax_draws():
    key = sampling_key(3, "text")
    found = np.asarray(noise(jnp.asarray([key], jnp.uint32), jnp.asarray([11]), 5000, UNSHARDED))[0]
    here = jax.random.fold_in(jax.random.wrap_key_data(np.array(key, np.uint32), impl="threefry2x32"), 11)
    uniform = (np.asarray(jax.random.bits(here, (5000,)), np.float64) + 0.5) / 2**32
    np.testing.assert_allclose(found, -np.log(-np.log1p(-uniform)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("scale", [0.1, 3.0, 60.0])
def test_the_nucleus_is_that_of_sorting(top_p, scale):
    rows = (scale * np.random.default_rng(1).normal(size=(64, 501))).astype(np.float32)
    found = np.asarray(nucleus(jnp.asarray(rows), top_p, UNSHARDED))
    for row, inside in zip(rows, found, strict=True):
        assert inside.tolist() == (nucleus_by_sorting(row, top_p).tolist() if top_p < 1 else [True] * 501)


@pytest.mark.parametrize(("top_p", "inside"), [(0.3, [1, 3]), (0.5, [1, 3]), (0.75, [0, 1, 2, 3])])
def test_equally_likely_tokens_are_in_the_nucleus_together(top_p, inside):
    found = nucleus(jnp.asarray([[0.0, 1.0, -0.0, 1.0, -9.0]]), top_p, UNSHARDED)
    assert np.flatnonzero(found[0]).tolist() == inside


def test_keys_of_seeds_and_names_differ_and_stay_what_they_are():
    keys = {sampling_key(seed, name) for seed in range(20) for name in map(str, range(50))}
    assert len(keys) == 1000
    assert sampling_key(1, "23") != sampling_key(12, "3")
    assert sampling_key(0, "text") == (0x4028576A, 0xC4E378CE)  # sha256sum's


def test_shards_of_the_vocabulary_draw_what_one_device_draws():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(PROGRAMS / "sampling_on_eight_devices.py")]
    made = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert made.returncode == 0, made.stderr[-3000:]
    found = json.loads(made.stdout.splitlines()[-1])
    assert list(found) == ["1x1x1", "1x8x1", "2x2x2"]
    alone = found.pop("1x1x1")
    assert len({token for row in alone["tokens"] for token in row}) > 20
    for mesh, one in found.items():
        for name in ("tokens", "noise", "top_ids"):
            assert one[name] == alone[name], (mesh, name)
        for name in ("chosen", "top"):
            np.testing.assert_allclose(one[name], alone[name], rtol=0, atol=1e-5)
