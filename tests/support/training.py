"""A target, a teacher cache and a configuration small enough to train a draft on in a few steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from pipeline.artifacts import artifact, provenance
from pipeline.config.choices import FeatureSource, FeatureStore, LossWeights
from pipeline.config.fields import TARGET as TARGET_KIND
from pipeline.config.fields import TEACHER_CACHE
from pipeline.config.schema import DraftConfig, PipelineConfig, TargetConfig, TeacherCacheConfig, TrainConfig
from pipeline.model.dflash import config as draft_config
from pipeline.model.dflash import weights as dflash_weights
from pipeline.model.dflash.model import DraftModel
from pipeline.model.gpt_oss import weights as gpt_oss_weights
from pipeline.model.gpt_oss.config import GptOssConfig
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.hf.directory import save_target
from pipeline.model.layers.rope import Rope
from pipeline.prompts.channels import Channel
from pipeline.store.layout import CachedSequence, CacheLayout, ShardRows, shard_path
from pipeline.store.writer import ShardContents, write_header, write_shard
from pipeline.workspace import settings
from pipeline.workspace.workspace import Workspace
from tests.support import once
from tests.support.compiled import QUICKLY
from tests.support.paths import ROOT
from tests.support.recorder import Recorder

VOCAB_SIZE, MASK_TOKEN, END_TOKEN = 61, "<mask>", "<end>"
TARGET = GptOssConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=20,
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
DRAFT = draft_config.DFlashConfig(
    vocab_size=37,
    hidden_size=20,
    intermediate_size=28,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=10,
    rope=Rope(theta=10000.0),
    tapped_layers=(0, 2),
    num_target_layers=4,
    block_size=5,
    mask_token_id=36,
)
NUM_TAPPED = 2
GIT_COMMIT = "0" * 40
LIMIT_SECONDS = 300  # of a training process on a machine that does other things too
SHARD_SEQUENCES = 5
LONGEST = 43  # tokens of a sequence: padded to 32 or to 64, and so with two compiled steps
ONE_LENGTH = 32  # with one


def draft_of(seed: int, config: draft_config.DFlashConfig = DRAFT) -> DraftModel:
    """A draft of which no weight is at rest: norms and biases too are drawn."""
    random = np.random.default_rng(seed)

    def drawn(path: tuple, shape: jax.ShapeDtypeStruct) -> jax.Array:
        noise = random.normal(size=shape.shape)
        if len(shape.shape) == 2:
            return jnp.asarray(noise * (shape.shape[0] ** -0.5 + 0.2), shape.dtype)
        return jnp.asarray(jax.tree_util.keystr(path).endswith("norm") + 0.2 * noise, shape.dtype)

    return DraftModel(config, jax.tree_util.tree_map_with_path(drawn, dflash_weights.weight_shapes(config)))


def make_target(directory: Path) -> Path:
    """An HF directory: random weights, a tokenizer with a mask token and one that ends an answer, a template."""
    directory.mkdir(parents=True)
    weights = gpt_oss_weights.random_weights(TARGET, jax.random.key(3))
    token_ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    save_target(directory, TargetModel(TARGET, weights), token_ids)
    words = {str(number): number for number in range(VOCAB_SIZE)}
    words = {MASK_TOKEN: words.pop(str(VOCAB_SIZE - 1)), END_TOKEN: words.pop("1"), **words}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=MASK_TOKEN))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_TOKEN).save_pretrained(directory)
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    return directory


def configuration(root: Path, **train: object) -> PipelineConfig:
    """Of the target in `root / "target"`; everything made goes to `root / "outputs"`."""
    defaults = {
        "steps": 12,
        "batch_sequences": 8,  # which two hosts with four devices each share out
        "anchors_per_sequence": 6,
        "checkpoint_steps": 4,
        "eval_steps": 5,
        "log_steps": 1,
        "learning_rate": 1e-2,
    }
    return PipelineConfig(
        output_dir=str(root / "outputs"),
        target=TargetConfig(name="random", path=str(root / "target")),
        teacher_cache=TeacherCacheConfig(max_prompt_tokens=16, max_new_tokens=32),
        draft=DraftConfig(
            block_size=4,
            num_hidden_layers=2,
            num_tapped_layers=NUM_TAPPED,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=6,
            intermediate_size=36,
            mask_token=MASK_TOKEN,
        ),
        train=TrainConfig(
            **{
                **defaults,
                **train,
                "features": FeatureSource(train.get("features", "cached")),
                "loss_weights": LossWeights(train.get("loss_weights", "decay")),
            }
        ),
    )


def counting(random: np.random.Generator, table: np.ndarray, longest: int) -> CachedSequence:
    """A prompt of a few tokens, then a count upwards by a constant step; features tell a token and its step."""
    step, first, length = random.integers(1, 4), random.integers(0, 50), random.integers(20, longest + 1)
    token_ids = ((first + step * np.arange(length)) % 50 + 5).astype(np.int32)
    return CachedSequence(
        token_ids=token_ids,
        channels=np.full(length, Channel.final, np.uint8),
        prompt_tokens=int(random.integers(3, 9)),
        features=(table[token_ids] + table[step]).astype(ml_dtypes.bfloat16),
    )


def write_split(root: Path, split: str, sequences: list[CachedSequence]) -> int:
    """Write sequences as shards; the number of shards."""
    groups = [sequences[start : start + SHARD_SEQUENCES] for start in range(0, len(sequences), SHARD_SEQUENCES)]
    for index, group in enumerate(groups):
        rows = ShardRows(
            prompt_ids=[f"{split}-{index}-{row}" for row in range(len(group))],
            efforts=["low"] * len(group),
            finish_reasons=["length"] * len(group),
            num_tokens=[len(one.token_ids) for one in group],
            prompt_tokens=[one.prompt_tokens for one in group],
        )
        token_ids = np.concatenate([one.token_ids for one in group])
        channels = np.concatenate([one.channels for one in group])
        features = np.concatenate([one.features for one in group])
        contents = ShardContents(
            rows=rows, token_ids=token_ids, channels=channels, features=features if features.size else None
        )
        layout = layout_of(features.shape[1])
        write_shard(shard_path(root, split, index), contents, layout=layout, fingerprint="", report={})
    return len(groups)


def layout_of(feature_size: int) -> CacheLayout:
    """Features as served; none for a `feature_size` of 0."""
    stored, num_tapped = ("bfloat16", NUM_TAPPED) if feature_size else ("none", 0)
    return CacheLayout(stored=stored, feature_size=feature_size, num_tapped=num_tapped)


def write_store(
    root: Path, feature_size: int, *, num_train: int = 18, num_heldout: int = 7, longest: int = LONGEST
) -> Path:
    """A store of counting sequences, without features when `feature_size` is 0."""
    random = np.random.default_rng(5)
    table = random.normal(size=(VOCAB_SIZE, feature_size))
    shards = {
        split: write_split(root, split, [counting(random, table, longest) for _ in range(count)])
        for split, count in {"train": num_train, "heldout": num_heldout}.items()
    }
    write_header(root, layout_of(feature_size), shards)
    return root


def make_cache(config: PipelineConfig, longest: int = LONGEST) -> None:
    """The teacher cache of a configuration, filled with sequences that can be learned."""
    workspace = Workspace(config)
    has_features = settings.feature_store(config) is not FeatureStore.none
    scratch = artifact.open_scratch(workspace.address(TEACHER_CACHE), resume=False)
    write_store(scratch, has_features * NUM_TAPPED * TARGET.hidden_size, longest=longest)
    contract = workspace.contract(TEACHER_CACHE, {"git_commit": GIT_COMMIT})
    workspace.seal(TEACHER_CACHE, contract, {TARGET_KIND: workspace.target})


def trained() -> PipelineConfig:
    """A configuration whose draft stage=train has made, undisturbed, in a process of its own; read only."""
    return configuration(once.directory("training", _make))


def _make(root: Path) -> None:
    prepare(root)
    with start(root) as process:
        output, errors = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0, errors
    (root / "tracked.json").write_text(output)


def root_of(config: PipelineConfig) -> Path:
    """The directory that a configuration was prepared in."""
    return Path(config.output_dir).parent


def start(root: Path, *, stop_at: int = 0, **train: object) -> subprocess.Popen[str]:
    """Begin stage=train on what `prepare` put under `root`."""
    command = [sys.executable, "-m", "tests.support.training", str(root), str(stop_at), json.dumps(train)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | QUICKLY
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def prepare(root: Path, *, longest: int = LONGEST, **train: object) -> PipelineConfig:
    """Everything that stage=train needs, under `root`."""
    config = configuration(root, **train)
    make_target(root / "target")
    make_cache(config, longest)
    return config


def main() -> None:
    """Run stage=train: `python -m tests.support.training ROOT STOP_AT TRAIN_JSON`; prints what was tracked as JSON."""
    from pipeline.train import stage

    provenance.git_commit = lambda: GIT_COMMIT  # somebody may commit between two runs of one test
    root, stop_at, train = sys.argv[1:]
    tracker = Recorder(int(stop_at) or None)
    stage.run(configuration(Path(root), **json.loads(train)), tracker)
    print(json.dumps([[name, step, value] for (name, step), value in tracker.by_step.items()]))


if __name__ == "__main__":
    main()
