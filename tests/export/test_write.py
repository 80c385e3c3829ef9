"""The written draft: what the published package makes of it, and what is refused."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from pipeline.dflash import blocks
from pipeline.errors import PipelineError
from pipeline.export.parity import require_parity
from pipeline.export.write import write_draft
from pipeline.model.dflash import forward as dflash
from pipeline.model.dflash.model import DraftModel
from pipeline.model.hf.directory import read_draft
from pipeline.model.layers import kv_pages
from pipeline.model.layers.rope import Rope
from tests.support import training as tiny_training
from tests.support.oracles import run_oracle

YARN = Rope(theta=150000.0, factor=8.0, truncate=False, original_max_position_embeddings=32)
PLAIN = tiny_training.DRAFT
CONFIGS = {
    "no biases, plain RoPE": PLAIN,
    "biases, YaRN": dataclasses.replace(PLAIN, attention_bias=True, rope=YARN, num_hidden_layers=3),
}
TOKEN_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
NUM_SEQUENCES, CHUNKS = 2, (7, 1, 4, 9, 20)
TOLERANCE = 1e-4


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request):
    return request.param


def inputs_of(config):
    random = np.random.default_rng(4)
    num_context = sum(CHUNKS)
    features = random.normal(size=(NUM_SEQUENCES, num_context, config.feature_size)).astype(np.float32)
    embeddings = random.normal(size=(NUM_SEQUENCES, config.block_size, config.hidden_size)).astype(np.float32)
    return features, embeddings


def blocks_of(draft, features, embeddings):
    """Hidden states [A, B, K, D] of the same block at the end of every chunk, all of them in one call."""
    config, num_context = draft.config, features.shape[1]
    anchors = jnp.broadcast_to(jnp.cumsum(jnp.array(CHUNKS)), (NUM_SEQUENCES, len(CHUNKS)))
    positions = jnp.broadcast_to(jnp.arange(num_context), features.shape[:2])
    context = dflash.context(draft, jnp.asarray(features), positions)
    slots = blocks.block_positions(anchors, config.block_size)
    noise = jnp.broadcast_to(embeddings[:, None], (*slots.shape, config.hidden_size))
    visible = blocks.context_visible(anchors, num_context)
    hidden = dflash.denoise_blocks(draft, noise, slots, context, visible)
    return np.moveaxis(np.asarray(hidden), 1, 0)


@pytest.mark.conformance
def test_the_published_package_computes_what_we_train(config, tmp_path):
    """Its cached rounds, one block at a time, are our A blocks in one call (docs/dflash.md#blocks)."""
    directory = tmp_path / "dflash"
    directory.mkdir()
    write_draft(directory, tiny_training.draft_of(0, config), TOKEN_IDS)
    read = read_draft(directory, jnp.float32)
    assert read.config == config
    features, embeddings = inputs_of(config)
    np.savez(tmp_path / "in.npz", features=features, noise_embedding=embeddings, chunks=np.array(CHUNKS))
    run_oracle("dflash_forward", draft=directory, inputs=tmp_path / "in.npz", outputs=tmp_path / "out.npz")
    wanted = np.load(tmp_path / "out.npz")["hidden_rounds"]
    found = blocks_of(read, features, embeddings)
    assert found.shape == wanted.shape
    assert wanted.std() > 0.5
    difference = np.abs(found - wanted).max()
    print(f"largest difference {difference:.2e} of outputs with deviation {wanted.std():.2f}")
    assert difference < TOLERANCE


def test_many_blocks_in_one_call_are_single_blocks_over_a_cache(config):
    draft = tiny_training.draft_of(1, config)
    features, embeddings = inputs_of(config)
    together = blocks_of(draft, features, embeddings)
    table = kv_pages.consecutive_tables(NUM_SEQUENCES, 64, 16).whole
    cache = dflash.empty_cache(config, table.size, 16, jnp.float32)
    start = 0
    for index, size in enumerate(CHUNKS):
        positions = jnp.broadcast_to(jnp.arange(start, start + size), (NUM_SEQUENCES, size))
        new = dflash.context(draft, jnp.asarray(features[:, start : start + size]), positions)
        cache = dflash.extend(cache, new, table, jnp.full(NUM_SEQUENCES, start))
        start += size
        alone = dflash.denoise(draft, jnp.asarray(embeddings), jnp.full(NUM_SEQUENCES, start), cache, table)
        np.testing.assert_allclose(together[index], alone, atol=2e-5)


def test_a_draft_that_is_not_the_trained_one_is_refused(tmp_path):
    draft = tiny_training.draft_of(0)
    write_draft(tmp_path, draft, TOKEN_IDS)
    other = DraftModel(PLAIN, dataclasses.replace(draft.weights, norm=draft.weights.norm + 0.01))
    with pytest.raises(PipelineError, match="norm: not the trained weight rounded"):
        require_parity(tmp_path, other)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rms_norm_eps"] = 0.5
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(PipelineError, match="rms_norm_eps: 0.5, wanted 1e-05"):
        require_parity(tmp_path, draft)


def test_weights_that_bfloat16_ruins_are_refused(tmp_path):
    weights = tiny_training.draft_of(0).weights
    sharp = [  # attention so sharp that rounding decides which position it picks
        dataclasses.replace(
            layer, query_norm=100 * layer.query_norm, key_norm=100 * layer.key_norm, value=30 * layer.value
        )
        for layer in weights.layers
    ]
    with pytest.raises(PipelineError, match="do not survive bfloat16"):
        write_draft(tmp_path, DraftModel(PLAIN, dataclasses.replace(weights, layers=tuple(sharp))), TOKEN_IDS)
