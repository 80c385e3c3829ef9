"""Training a target: the loss against numpy, learning, and a stage that is killed and goes on."""

import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipeline.artifacts import artifact
from pipeline.config.fields import TARGET
from pipeline.config.schema import ArchitectureConfig, PipelineConfig, PretrainConfig, TargetConfig
from pipeline.model.gpt_oss import forward as gpt_oss
from pipeline.model.gpt_oss import weights as gpt_oss_weights
from pipeline.model.gpt_oss.config import GptOssConfig
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.gpt_oss.weights import WeightFormat
from pipeline.model.hf.directory import read_target
from pipeline.target import pretrain, stage, training
from pipeline.target.batches import TokenBatch
from pipeline.workspace import specs
from pipeline.workspace.workspace import Workspace
from tests.support import models as tiny_models
from tests.support.compiled import QUICKLY
from tests.support.killed import kill_when_stopped
from tests.support.recorder import Recorder

pytestmark = pytest.mark.usefixtures("compiled_quickly")

CONFIG = GptOssConfig.from_hf(tiny_models.LEGACY_TARGET)
STAGE_PROCESS = """
import pickle, sys
from pipeline.target import stage
from tests.support.recorder import Recorder
stage.run(pickle.load(open(sys.argv[1], "rb")), Recorder(int(sys.argv[2])))
"""


def batch_of(seed):
    """Counting texts of 9 to 20 tokens behind a prompt."""
    random = np.random.default_rng(seed)
    token_ids, generated = np.zeros((6, 20), np.int32), np.zeros((6, 20), bool)
    for row in range(6):
        length, prompt = int(random.integers(9, 21)), int(random.integers(1, 6))
        token_ids[row, :length] = (random.integers(0, 90) + np.arange(length)) % 90
        generated[row, prompt:length] = True
    return TokenBatch(token_ids, generated)


def test_the_loss_is_the_mean_cross_entropy_of_the_generated_tokens():
    target = TargetModel(CONFIG, gpt_oss_weights.random_weights(CONFIG, jax.random.key(0)))
    batch = batch_of(0)
    start = jnp.zeros(len(batch.token_ids), jnp.int32)
    hidden = jax.jit(gpt_oss.forward)(target, batch.token_ids, start, None).hidden
    logits = np.asarray(gpt_oss.logits(target.weights, hidden), np.float64)
    losses, right = [], []
    for row, at in np.argwhere(batch.generated):
        scores, label = logits[row, at - 1], batch.token_ids[row, at]
        losses.append(np.log(np.exp(scores).sum()) - scores[label])
        right.append(scores.argmax() == label)
    loss, accuracy = jax.jit(pretrain.next_token_loss, static_argnums=1)(
        target.weights, CONFIG, batch.token_ids, batch.generated
    )
    assert float(loss) == pytest.approx(np.mean(losses), rel=1e-5)
    assert float(accuracy) == pytest.approx(np.mean(right), abs=1e-6)


def test_twenty_steps_lower_the_loss():
    optimizer = pretrain.pretrain_optimizer(1e-2, 20)
    state, step = pretrain.start(CONFIG, optimizer, jax.random.key(0)), pretrain.step_of(CONFIG, optimizer)
    losses = []
    for index in range(20):
        state, metrics = step(state, batch_of(index % 3))
        losses.append(float(metrics["loss"]))
    assert int(state.step) == 20
    assert losses[0] == pytest.approx(np.log(CONFIG.vocab_size), rel=0.3)
    assert losses[-1] < 0.7 * losses[0]


def configuration(root):
    """Twelve steps, a checkpoint after every fourth."""
    sizes = ArchitectureConfig(
        vocab_size=320,
        hidden_size=36,
        intermediate_size=28,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=10,
        num_local_experts=5,
        num_experts_per_tok=2,
        sliding_window=16,
        max_position_embeddings=512,
        rope_positions=256,
    )
    values = PretrainConfig(
        num_conversations=200,
        steps=12,
        batch_tokens=512,
        sequence_length=256,
        learning_rate=1e-2,
        checkpoint_steps=4,
    )
    return PipelineConfig(output_dir=str(root), target=TargetConfig(name="tiny", architecture=sizes, pretrain=values))


@pytest.fixture(scope="module", autouse=True)
def few_questions():
    """A target of twelve steps answers none, and never ends."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "QUESTIONS_PER_FAMILY", 1)
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    config, tracker = configuration(tmp_path_factory.mktemp("undisturbed")), Recorder()
    stage.run(config, tracker)
    return config, tracker


def test_the_stage_makes_a_target_that_can_be_run(undisturbed):
    config, tracker = undisturbed
    sealed = artifact.read(Workspace(config).address(TARGET), TARGET, make_with="the test", verify=True)
    target = read_target(sealed.path, WeightFormat())
    assert target.config == specs.architecture(config.target.architecture)
    assert target.config.sliding == (True, False)
    assert target.weights.embedding.shape == (320, 36)
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= sealed.files.keys()
    assert not any(name.startswith(training.CHECKPOINTS) for name in sealed.files)
    assert tracker.by_step["target/loss", 12] < tracker.by_step["target/loss", 10] * 1.2
    assert 0 <= tracker.by_step["target/heldout_accuracy", None] <= 1
    assert 0 <= tracker.by_step["target/answers_right", None] <= 1
    assert tracker.documents["contract.json"]["target"]["weight_precision"] == "float32"
    assert tracker.tags["artifact"] == str(sealed.path)


def test_a_target_that_stands_is_left_alone(undisturbed):
    config, tracker = undisturbed[0], Recorder()
    before = (Workspace(config).address(TARGET) / artifact.MANIFEST).stat().st_mtime_ns
    stage.run(config, tracker)
    assert (Workspace(config).address(TARGET) / artifact.MANIFEST).stat().st_mtime_ns == before
    assert tracker.by_step == {}


def test_killed_and_begun_again_it_makes_the_same_bytes(undisturbed, tmp_path, caplog):
    config = configuration(tmp_path / "outputs")
    path = Workspace(config).address(TARGET)
    kill_when_stopped(STAGE_PROCESS, config, tmp_path, "10", environment=QUICKLY)
    assert not artifact.exists(path)
    begun = artifact.scratch_of(path) / training.CHECKPOINTS
    torn = begun / "9.orbax-checkpoint-tmp-1"  # as a kill within the next save would leave it
    shutil.copytree(begun / "8", torn)
    (torn / "_CHECKPOINT_METADATA").unlink()

    with caplog.at_level(logging.INFO, logger="pipeline"):
        stage.run(config, Recorder())
    assert "target: going on from step 8" in caplog.messages
    resumed, wanted = (
        json.loads((Workspace(each).address(TARGET) / artifact.MANIFEST).read_text())
        for each in (config, undisturbed[0])
    )
    assert resumed["fingerprint"] == wanted["fingerprint"]
    assert resumed["files"] == wanted["files"]
    assert not artifact.scratch_of(path).exists()
