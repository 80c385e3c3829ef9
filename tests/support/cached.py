"""Fixtures: a small random target on disk, the configuration that caches its text, and the cache."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipeline.artifacts import artifact
from pipeline.artifacts.artifact import Artifact
from pipeline.config.fields import TEACHER_CACHE
from pipeline.config.schema import DraftConfig, PipelineConfig, PromptsConfig, TargetConfig, TeacherCacheConfig
from pipeline.model.gpt_oss import weights as gpt_oss_weights
from pipeline.model.gpt_oss.config import GptOssConfig
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.hf.directory import save_target
from pipeline.model.layers.rope import Rope
from pipeline.prompts import corpus
from pipeline.prompts.tokenizer import train_tokenizer
from pipeline.teacher_cache import stage
from pipeline.workspace.workspace import Workspace
from tests.support.compiled import quickly
from tests.support.recorder import Recorder

VOCAB_SIZE = 300
MODEL = GptOssConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=40,
    intermediate_size=28,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=10,
    num_local_experts=5,
    num_experts_per_tok=2,
    sliding_window=16,
    sliding=(True, False, True, False),
    rope=Rope(theta=10000.0),
    max_position_embeddings=256,
)


@pytest.fixture(scope="session")
def target_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An HF directory of random weights, large enough that its greedy text does not fall into a loop at once."""
    directory = tmp_path_factory.mktemp("target")
    weights = jax.jit(lambda key: gpt_oss_weights.random_weights(MODEL, key))(jax.random.key(3))
    random = np.random.default_rng(4)
    weights = jax.tree.map(lambda leaf: leaf + jnp.asarray(0.3 * random.normal(size=leaf.shape), leaf.dtype), weights)
    save_target(directory, TargetModel(MODEL, weights), {"eos_token_id": 293, "pad_token_id": 291})
    texts = [corpus.conversation(0, index, "low").prompt for index in range(200)]
    train_tokenizer(texts, VOCAB_SIZE).save_pretrained(directory)
    return directory


@pytest.fixture
def config(target_directory: Path, tmp_path: Path) -> PipelineConfig:
    """Twenty-six prompts, answers of at most 24 tokens, shards of seven."""
    return configuration(target_directory, tmp_path / "outputs")


def configuration(target_directory: Path, output_dir: Path) -> PipelineConfig:
    """The configuration that the tests of the stage vary."""
    return PipelineConfig(
        output_dir=str(output_dir),
        target=TargetConfig(name="random", path=str(target_directory)),
        prompts=PromptsConfig(count=26, heldout_fraction=0.5),
        teacher_cache=TeacherCacheConfig(max_prompt_tokens=160, max_new_tokens=24, slots=4, shard_sequences=7),
        draft=DraftConfig(block_size=4, num_tapped_layers=2),
    )


@pytest.fixture
def tracker() -> Recorder:
    """A tracker that remembers what was logged."""
    return Recorder()


@pytest.fixture(scope="session")
def cache(target_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A cache that nothing has disturbed; read only."""
    undisturbed = configuration(target_directory, tmp_path_factory.mktemp("undisturbed"))
    with quickly():  # as all tests do that compare their own with it
        stage.run(undisturbed, Recorder())
    path = Workspace(undisturbed).address(TEACHER_CACHE)
    return artifact.read(path, TEACHER_CACHE, make_with="the test", verify=True)
