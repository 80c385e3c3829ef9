"""Training with the target inside the job: the same features, and so the same gradients, as from a cache."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipeline.config.fields import CHECKPOINT
from pipeline.dflash import blocks
from pipeline.engine.capture import capture
from pipeline.export.easydel_checkpoint import read_checkpoint
from pipeline.model.dflash.config import DFlashConfig
from pipeline.model.gpt_oss import weights as gpt_oss_weights
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.hf.directory import save_draft, weights_fingerprint
from pipeline.model.layers.rope import Rope
from pipeline.model.parallel.runtime import SINGLE_DEVICE
from pipeline.prompts.channels import Channel
from pipeline.store.layout import CachedSequence
from pipeline.train.data.live_target import LiveTarget
from pipeline.train.data.rows import stack
from pipeline.train.loss.objective import TrainBatch
from pipeline.train.loss.vocab_shard import FrozenTables
from pipeline.train.recipe import Objective
from pipeline.workspace.workspace import Workspace
from tests.support import training as tiny_training
from tests.support.loss import draft_loss
from tests.support.training import TARGET, VOCAB_SIZE

pytestmark = pytest.mark.usefixtures("compiled_quickly")
TAPPED, LENGTHS = (0, 2), (29, 40, 17)
DRAFT = DFlashConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=TARGET.hidden_size,
    intermediate_size=26,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    rope=Rope(theta=10000.0),
    tapped_layers=TAPPED,
    num_target_layers=TARGET.num_hidden_layers,
    block_size=5,
    mask_token_id=VOCAB_SIZE - 1,
)


@pytest.fixture(scope="module")
def target():
    weights = gpt_oss_weights.random_weights(TARGET, jax.random.key(3))
    return LiveTarget(TargetModel(TARGET, weights), TAPPED, SINGLE_DEVICE, distils=True)


def texts():
    random = np.random.default_rng(1)
    return [random.integers(0, VOCAB_SIZE - 1, length).astype(np.int32) for length in LENGTHS]


def stored(features):
    rows = zip(texts(), features, strict=True)
    marks = [np.full(length, Channel.final, np.uint8) for length in LENGTHS]
    return [
        CachedSequence(token_ids=text, channels=mark, prompt_tokens=5, features=one)
        for (text, one), mark in zip(rows, marks, strict=True)
    ]


def with_anchors(batch):
    drawn = [blocks.draw_anchors(np.random.default_rng(row), marks, 7) for row, marks in enumerate(batch["generated"])]
    anchors, taken = (np.stack(part) for part in zip(*drawn, strict=True))
    return batch | {"anchors": anchors, "anchor_taken": taken}


@jax.jit
def loss_and_gradients(draft, tables, batch):
    objective = Objective(tuple(blocks.position_weights(DRAFT.block_size, 4.0).tolist()))
    return jax.value_and_grad(lambda one: draft_loss(one, tables, batch, objective)[0])(draft)


def gradients(live, batch):
    weights = live.target.weights
    tables = FrozenTables(weights.embedding, weights.head, VOCAB_SIZE)
    fields = TrainBatch(**jax.tree.map(jnp.asarray, batch))
    return loss_and_gradients(tiny_training.draft_of(0, DRAFT), tables, fields)


def test_gradients_are_those_of_cached_features(target):
    found = dict(capture(target.target, TAPPED, [text.tolist() for text in texts()]))
    cached = with_anchors(stack(stored([found[index].features for index in range(len(LENGTHS))]), 64))
    tokens = with_anchors(stack(stored([None] * len(LENGTHS)), 64))
    live = tokens | {"features": target.complete(tokens)["features"]}
    in_text = cached["features"].astype(np.float32).any(axis=-1)
    np.testing.assert_array_equal(np.asarray(live["features"])[in_text], cached["features"][in_text])
    (loss, wanted), (live_loss, got) = gradients(target, cached), gradients(target, live)
    assert float(live_loss) == pytest.approx(float(loss), rel=1e-6)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_sequences_of_an_evaluation_get_the_features_of_a_cache(target):
    found = dict(capture(target.target, TAPPED, [text.tolist() for text in texts()]))
    filled = target.with_features(stored([None] * len(LENGTHS)))
    for index, one in enumerate(filled):
        np.testing.assert_array_equal(one.features, found[index].features)


def test_the_teachers_states_give_the_targets_own_distribution(target):
    live = target.complete(with_anchors(stack(stored([None] * len(LENGTHS)), 64)))
    logits = jnp.asarray(live["teacher_hidden"]) @ target.target.weights.head
    found = dict(capture(target.target, TAPPED, [text.tolist() for text in texts()]))
    for row, length in enumerate(LENGTHS):
        np.testing.assert_array_equal(logits[row, :length].argmax(-1), found[row].next_ids)


def test_the_stage_trains_on_tokens_alone_from_a_draft_that_is_there(tmp_path):
    options = {"features": "live", "steps": 3, "eval_steps": 3, "distillation": 0.5, "ema_decay": 0.5}
    config = tiny_training.configuration(tmp_path, **options)
    tiny_training.make_target(tmp_path / "target")
    sizes = Workspace(config).draft_config
    stretched = Rope(theta=5000.0, factor=4.0, original_max_position_embeddings=64)
    draft = dataclasses.replace(sizes, attention_bias=True, rope=stretched)  # as the published ones for GPT-OSS
    begun_with = tiny_training.draft_of(7, draft)
    (tmp_path / "init-dflash").mkdir()
    save_draft(tmp_path / "init-dflash", begun_with, {})
    options |= {
        "init": str(tmp_path / "init-dflash"),
        "learning_rate": 1e-9,
    }  # what it begins with is what it ends with
    config = tiny_training.configuration(tmp_path, **options)
    tiny_training.make_cache(config, tiny_training.ONE_LENGTH)
    with tiny_training.start(tmp_path, **options) as process:
        _, errors = process.communicate(timeout=tiny_training.LIMIT_SECONDS)
    assert process.returncode == 0, errors
    made = Workspace(config).open(CHECKPOINT)
    assert made.settings["train.init"] == weights_fingerprint(tmp_path / "init-dflash")
    found = read_checkpoint(made.path / "run-3", draft)
    for one, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(begun_with.weights), strict=True):
        np.testing.assert_allclose(one, wanted, atol=1e-6)
    assert json.loads((made.path / "evaluation.json").read_text())["heldout"]["num_sequences"] == 7
