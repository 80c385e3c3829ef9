"""The target against transformers' GptOssForCausalLM, and one forward function against its own splits."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipeline.engine.expert_choices import expert_choices
from pipeline.errors import PipelineError
from pipeline.model.gpt_oss import forward as gpt_oss
from pipeline.model.gpt_oss.config import GptOssConfig
from pipeline.model.gpt_oss.weights import WeightFormat
from pipeline.model.hf.directory import read_target, save_target
from pipeline.model.layers import kv_pages
from tests.support import models as tiny_models
from tests.support.oracles import run_oracle

TOLERANCE = 1e-4
CASES = {
    "yarn": tiny_models.TARGET,
    "wide": tiny_models.WIDE_TARGET,
    "legacy rope keys": tiny_models.LEGACY_TARGET,
    "plain rope": tiny_models.PLAIN_ROPE_TARGET,
}
step = jax.jit(gpt_oss.forward, static_argnames=("tapped_layers", "execution"))


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def published(request, tmp_path_factory):
    """A directory that transformers wrote with large random weights, and what transformers computes with it."""
    directory = tmp_path_factory.mktemp("target")
    (directory / "wanted.json").write_text(json.dumps(request.param))
    run_oracle("make_gpt_oss", config=directory / "wanted.json", seed=3, out=directory)
    ids = np.random.default_rng(0).integers(0, request.param["vocab_size"], (3, 41)).astype(np.int32)
    np.savez(directory / "in.npz", input_ids=ids)
    run_oracle("gpt_oss_forward", model=directory, inputs=directory / "in.npz", outputs=directory / "out.npz")
    return directory, ids, dict(np.load(directory / "out.npz"))


def test_logits_and_every_layers_features_equal_transformers(published):
    directory, ids, expected = published
    target = read_target(directory, WeightFormat())
    everything = tuple(range(target.config.num_hidden_layers))
    out = step(target, ids, jnp.zeros(len(ids), jnp.int32), None, everything)
    logits = gpt_oss.logits(target.weights, out.hidden)
    features = np.moveaxis(expected["features"], 0, -2).reshape(out.features.shape)
    assert expected["logits"].std() > 1  # weights so small that errors hide would prove nothing
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(out.features, features, rtol=0, atol=TOLERANCE)


def test_every_layer_chooses_the_experts_that_transformers_router_chooses(published):
    directory, ids, expected = published
    target = read_target(directory, WeightFormat())
    texts = [row[:length].tolist() for row, length in zip(ids, (41, 7, 30), strict=True)]  # padded, in one batch
    found = dict(expert_choices(target, texts))
    assert found.keys() == {0, 1, 2}
    for row, text in enumerate(texts):
        wanted = np.moveaxis(expected["experts"][:, row, : len(text)], 0, 1)
        np.testing.assert_array_equal(found[row], wanted)


def test_transformers_opens_what_we_write_and_computes_the_same(published, tmp_path):
    directory, ids, expected = published
    target = read_target(directory, WeightFormat())
    save_target(tmp_path, target, {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    np.savez(tmp_path / "in.npz", input_ids=ids)
    run_oracle("gpt_oss_forward", model=tmp_path, inputs=tmp_path / "in.npz", outputs=tmp_path / "out.npz")
    again = dict(np.load(tmp_path / "out.npz"))
    assert (again["logits"] == expected["logits"]).all()
    assert (again["features"] == expected["features"]).all()


def paged(target, num_rows):
    """Empty pages for 64 positions of each row, and their tables."""
    tables = kv_pages.consecutive_tables(num_rows, 64, 16)
    return tables, gpt_oss.empty_cache(target.config, tables.whole.size, tables.whole.size, 16, jnp.float32)


SPLITS = {
    "steps alone": [1] * 41,
    "prefill then steps": [30, *[1] * 11],
    "prefill then blocks": [9, 8, 8, 8, 8],
    "uneven chunks": [16, 3, 1, 20, 1],
}


@pytest.mark.parametrize("chunks", SPLITS.values(), ids=SPLITS.keys())
def test_any_split_of_a_sequence_gives_the_full_forwards_logits_and_features(published, chunks):
    directory, ids, expected = published
    target = read_target(directory, WeightFormat())
    taps = (0, target.config.num_hidden_layers - 2)
    tables, cache = paged(target, len(ids))
    done, hidden, features = 0, [], []
    for length in chunks:
        start = jnp.full(len(ids), done, jnp.int32)
        out = step(target, ids[:, done : done + length], start, cache, taps, tables=tables)
        cache, done = out.cache, done + length
        hidden.append(out.hidden)
        features.append(out.features)
    logits = gpt_oss.logits(target.weights, jnp.concatenate(hidden, axis=1))
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=TOLERANCE)
    tapped = np.concatenate([expected["features"][layer] for layer in taps], axis=-1)
    np.testing.assert_allclose(jnp.concatenate(features, axis=1), tapped, rtol=0, atol=TOLERANCE)


def test_rows_roll_back_by_different_amounts_without_a_trace(published):
    directory, ids, expected = published
    target = read_target(directory, WeightFormat())
    random = np.random.default_rng(1)
    tables, cache = paged(target, len(ids))
    start = np.zeros(len(ids), np.int32)
    seen = np.zeros(ids.shape, bool)
    while (start < ids.shape[1]).any():
        width = 6
        block = random.integers(0, target.config.vocab_size, (len(ids), width)).astype(np.int32)
        good = np.minimum(random.integers(1, width + 1, len(ids)), ids.shape[1] - start)
        for row, (at, count) in enumerate(zip(start, good, strict=True)):
            block[row, :count] = ids[row, at : at + count]  # the rest is a rejected draft
        out = step(target, block, jnp.asarray(start), cache, (), tables=tables)
        cache = out.cache
        logits = np.asarray(gpt_oss.logits(target.weights, out.hidden))
        for row, (at, count) in enumerate(zip(start, good, strict=True)):
            wanted = expected["logits"][row, at : at + count]
            np.testing.assert_allclose(logits[row, :count], wanted, rtol=0, atol=TOLERANCE)
            seen[row, at : at + count] = True
        start = start + good
    assert seen.all()


def test_a_config_that_cannot_be_run_is_refused_with_every_reason():
    wrong = {**tiny_models.TARGET, "attention_bias": False, "hidden_act": "gelu"}
    del wrong["head_dim"]
    with pytest.raises(PipelineError) as error:
        GptOssConfig.from_hf(wrong)
    for part in ("attention_bias: found False, wanted True", "hidden_act: found 'gelu'", "head_dim: missing"):
        assert part in str(error.value)


def test_config_round_trip_keeps_every_value():
    for hf in CASES.values():
        config = GptOssConfig.from_hf(hf)
        assert GptOssConfig.from_hf(config.to_hf()) == config
