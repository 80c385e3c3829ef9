"""A target, a teacher cache and a configuration small enough to train a draft on in a few steps."""

import atexit
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from tokenizers import Tokenizer, models

from pipeline import artifacts, lineage
from pipeline.config import (
    DraftConfig,
    FeatureSource,
    FeatureStore,
    LossWeights,
    PipelineConfig,
    TargetConfig,
    TeacherCacheConfig,
    TrainConfig,
)
from pipeline.model import checkpoints, draft, gpt_oss_weights
from pipeline.model.gpt_oss_config import GptOssConfig
from pipeline.model.rope import Rope
from pipeline.prompts.channels import Channel
from pipeline.teacher_cache import store
from pipeline.tracking import Run

VOCAB_SIZE, MASK_TOKEN = 61, "<mask>"
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
DRAFT = draft.DraftConfig(
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


def weights_of(seed: int, config: draft.DraftConfig = DRAFT) -> draft.DraftWeights:
    """Draft weights of which none is at rest: norms and biases too are drawn."""
    leaves, structure = jax.tree.flatten(draft.random_weights(config, jax.random.key(seed)))
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [leaf + 0.2 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, noisy)


def make_target(directory: Path) -> Path:
    """An HF directory: random weights, a tokenizer with a mask token, a template."""
    directory.mkdir(parents=True)
    weights = gpt_oss_weights.random_weights(TARGET, jax.random.key(3))
    token_ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    checkpoints.save_target(directory, TARGET, weights, token_ids)
    words = {MASK_TOKEN: VOCAB_SIZE - 1, **{str(number): number for number in range(VOCAB_SIZE - 1)}}
    Tokenizer(models.WordLevel(words, unk_token=MASK_TOKEN)).save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    return directory


def configuration(root: Path, **train: object) -> PipelineConfig:
    """Of the target in `root / "target"`; everything made goes to `root / "outputs"`."""
    defaults = {
        "steps": 12,
        "batch_sequences": 4,
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


def counting(random: np.random.Generator, table: np.ndarray) -> store.CachedSequence:
    """A prompt of a few tokens, then a count upwards by a constant step; features tell a token and its step."""
    step, first, length = random.integers(1, 4), random.integers(0, 50), random.integers(20, 44)
    token_ids = ((first + step * np.arange(length)) % 50 + 5).astype(np.int32)
    return store.CachedSequence(
        token_ids=token_ids,
        channels=np.full(length, Channel.final, np.uint8),
        prompt_tokens=int(random.integers(3, 9)),
        features=(table[token_ids] + table[step]).astype(ml_dtypes.bfloat16),
    )


def write_split(root: Path, split: str, sequences: list[store.CachedSequence]) -> int:
    """Write sequences as shards; the number of shards."""
    groups = [sequences[start : start + SHARD_SEQUENCES] for start in range(0, len(sequences), SHARD_SEQUENCES)]
    for index, group in enumerate(groups):
        rows = store.Rows(
            prompt_ids=[f"{split}-{index}-{row}" for row in range(len(group))],
            efforts=["low"] * len(group),
            finish_reasons=["length"] * len(group),
            num_tokens=[len(one.token_ids) for one in group],
            prompt_tokens=[one.prompt_tokens for one in group],
        )
        token_ids = np.concatenate([one.token_ids for one in group])
        channels = np.concatenate([one.channels for one in group])
        features = np.concatenate([one.features for one in group])
        path = store.shard_path(root, split, index)
        layout = layout_of(features.shape[1])
        given = features if features.size else None
        store.write_shard(path, rows, token_ids, channels, given, layout=layout, fingerprint="", report={})
    return len(groups)


def layout_of(feature_size: int) -> store.Layout:
    """Features as served; none for a `feature_size` of 0."""
    stored, num_tapped = ("bfloat16", NUM_TAPPED) if feature_size else ("none", 0)
    return store.Layout(stored=stored, feature_size=feature_size, num_tapped=num_tapped)


def write_store(root: Path, feature_size: int, *, num_train: int = 18, num_heldout: int = 7) -> Path:
    """A store of counting sequences, without features when `feature_size` is 0."""
    random = np.random.default_rng(5)
    table = random.normal(size=(VOCAB_SIZE, feature_size))
    shards = {
        split: write_split(root, split, [counting(random, table) for _ in range(count)])
        for split, count in {"train": num_train, "heldout": num_heldout}.items()
    }
    store.write_header(root, layout_of(feature_size), shards)
    return root


def make_cache(config: PipelineConfig) -> None:
    """The teacher cache of a configuration, filled with sequences that can be learned."""
    target = lineage.target(config)
    path = lineage.teacher_cache_address(config, target)
    has_features = lineage.feature_store(config) is not FeatureStore.none
    write_store(artifacts.open_scratch(path, resume=False), has_features * NUM_TAPPED * TARGET.hidden_size)
    settings = lineage.teacher_cache_settings(config, target)
    contract = lineage.cache_contract(config, target, {"git_commit": GIT_COMMIT})
    artifacts.seal(path, kind=lineage.TEACHER_CACHE, settings=settings, contract=contract.to_json())


@functools.cache
def trained() -> PipelineConfig:
    """A configuration whose draft stage=train has made, undisturbed, in a process of its own; read only."""
    root = Path(tempfile.mkdtemp(prefix="tiny-training-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    config = prepare(root)
    with start(root) as process:
        output, errors = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0, errors
    (root / "tracked.json").write_text(output)
    return config


def root_of(config: PipelineConfig) -> Path:
    """The directory that a configuration was prepared in."""
    return Path(config.output_dir).parent


def start(root: Path, *, stop_at: int = 0, **train: object) -> subprocess.Popen[str]:
    """Begin stage=train on what `prepare` put under `root`."""
    command = [sys.executable, __file__, str(root), str(stop_at), json.dumps(train)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def prepare(root: Path, **train: object) -> PipelineConfig:
    """Everything that stage=train needs, under `root`."""
    config = configuration(root, **train)
    make_target(root / "target")
    make_cache(config)
    return config


class Recorder(Run):
    """A tracker that remembers; with `stop_at` it stops for good at that step, waiting to be killed."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at
        self.metrics: dict[tuple[str, int | None], float] = {}
        self.documents: dict[str, object] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics |= {(name, step): value for name, value in metrics.items()}
        if step is not None and step == self.stop_at:
            print("stopped", flush=True)
            time.sleep(3600)

    def log_json(self, name: str, value: object) -> None:
        self.documents[name] = value

    def log_artifact(self, path: Path) -> None:
        self.documents[path.name] = path.read_text()

    def log_params(self, params: object) -> None:
        self.documents["params"] = params

    def set_tag(self, key: str, value: str) -> None:
        self.documents[key] = value


def main() -> None:
    """Run stage=train: `tiny_training.py ROOT STOP_AT TRAIN_JSON`; prints what was tracked as JSON."""
    from pipeline.train import stage

    artifacts.git_commit = lambda: GIT_COMMIT  # somebody may commit between two runs of one test
    root, stop_at, train = sys.argv[1:]
    tracker = Recorder(int(stop_at) or None)
    stage.run(configuration(Path(root), **json.loads(train)), tracker)
    print(json.dumps([[name, step, value] for (name, step), value in tracker.metrics.items()]))


if __name__ == "__main__":
    main()
