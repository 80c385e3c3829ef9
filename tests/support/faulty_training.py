"""Checkpoints as a faulty training would have left them: sealed and consistent, and wrong in one convention."""

import contextlib
import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorstore

from pipeline.artifacts import artifact
from pipeline.artifacts.artifact import Artifact
from pipeline.artifacts.files import write_bytes, write_json
from pipeline.config.fields import CHECKPOINT, TEACHER_CACHE
from pipeline.config.schema import PipelineConfig
from pipeline.dflash import blocks
from pipeline.engine.capture import capture
from pipeline.export.easydel_checkpoint import read_checkpoint
from pipeline.model.dflash import weights as dflash_weights
from pipeline.model.dflash.config import DFlashConfig
from pipeline.model.dflash.model import DraftModel
from pipeline.model.dflash.weights import DFlashWeights
from pipeline.model.gpt_oss.weights import WeightFormat
from pipeline.model.hf import dflash as hf_dflash
from pipeline.model.hf.directory import read_embedding_and_head, read_target, weight_paths
from pipeline.store import heldout_rounds
from pipeline.store.checkpoint_files import DRAFT_CONFIG, EVALUATION
from pipeline.store.heldout_rounds import HeldoutText
from pipeline.store.reader import CacheSplit, open_split
from pipeline.train.data.padded import PaddedBatches
from pipeline.train.evaluation.evaluate import evaluate
from pipeline.train.loss.objective import TrainBatch
from pipeline.train.loss.vocab_shard import FrozenTables
from pipeline.train.recipe import Objective
from pipeline.workspace.workspace import TargetArtifact, Workspace, own_draft_config
from tests.support import loop as tiny_loop
from tests.support.loss import draft_loss

STEPS, LEARNING_RATE = 250, 6e-3
_UNUSED_SIZES = itertools.count(100_000)


@dataclasses.dataclass(frozen=True)
class Trained:
    """What the right training left."""

    config: PipelineConfig
    target: TargetArtifact
    checkpoint: Artifact
    draft: DraftModel
    texts: Sequence[HeldoutText]

    @classmethod
    def read(cls) -> "Trained":
        """From the loop's directories."""
        config = tiny_loop.copy(tiny_loop.trained())
        workspace = Workspace(config)
        checkpoint = workspace.open(CHECKPOINT)
        sizes = own_draft_config(checkpoint)
        draft = DraftModel(sizes, read_checkpoint(run_of(checkpoint.path), sizes))
        texts = heldout_rounds.read_texts(checkpoint.path / heldout_rounds.FILE)
        return cls(config, workspace.target, checkpoint, draft, texts)


def run_of(checkpoint: Path) -> Path:
    """The directory of its weights."""
    (found,) = checkpoint.glob("run-*")
    return found


def seal(
    trained: Trained,
    path: Path,
    config: PipelineConfig,
    *,
    weights: DFlashWeights | None = None,
    texts: Sequence[HeldoutText] | None = None,
    sizes: DFlashConfig | None = None,
) -> PipelineConfig:
    """A checkpoint at `path` that says it is `config`'s, of other weights, rounds or sizes when given; its config."""
    scratch = artifact.scratch_of(path)
    shutil.copytree(trained.checkpoint.path, scratch)
    (scratch / artifact.MANIFEST).unlink()
    workspace = Workspace(config)
    sizes = sizes or workspace.draft_config
    write_json(scratch / DRAFT_CONFIG, hf_dflash.config_to_hf(sizes, "float32", {}))
    if weights is not None:
        _overwrite(run_of(scratch) / "model", weights)
    if texts is not None:
        total = heldout_rounds.acceptance_of(texts, sizes.block_size)
        evaluation = json.loads((scratch / EVALUATION).read_text())
        evaluation["heldout"] |= {"histogram": list(total.histogram), **total.metrics()}
        write_json(scratch / EVALUATION, evaluation)
        write_bytes(scratch / heldout_rounds.FILE, heldout_rounds.to_lines(texts))
    artifact.seal(
        path,
        kind=CHECKPOINT,
        key=workspace.key(CHECKPOINT),
        settings=trained.checkpoint.settings,
        parents=trained.checkpoint.parents,
        contract=workspace.contract(CHECKPOINT).to_json(),
    )
    config = tiny_loop.copy(config)
    config.train.path = str(path)
    return config


def train(
    trained: Trained,
    config: PipelineConfig,
    fault: contextlib.AbstractContextManager,
    *,
    embedding_is_head: bool = False,
) -> tuple[DFlashWeights, Sequence[HeldoutText]]:
    """Train the draft of `config` under a fault from the beginning, and score the held-out texts under it."""
    cache = Workspace(trained.config).open(TEACHER_CACHE)
    splits = {name: open_split(cache.path, name) for name in ("train", "heldout")}
    sizes = Workspace(config).draft_config
    if sizes.tapped_layers != trained.draft.config.tapped_layers:
        for split in splits.values():
            _tap(split, trained.target.path, sizes.tapped_layers)
    embedding, head = read_embedding_and_head(trained.target.path, jnp.float32)
    tables = FrozenTables(embedding, embedding.T if embedding_is_head else head, len(embedding))
    # another model to jit, else the evaluation would run as it was traced without the fault
    sizes = dataclasses.replace(sizes, max_position_embeddings=next(_UNUSED_SIZES))
    batches = PaddedBatches(splits["train"], num_sequences=8, num_anchors=16, seed=1)
    weights_of_positions = blocks.position_weights(sizes.block_size, blocks.default_decay(sizes.block_size))
    objective = Objective(tuple(weights_of_positions.tolist()))
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, STEPS))

    def loss(weights: DFlashWeights, batch: dict[str, np.ndarray]) -> jax.Array:
        return draft_loss(DraftModel(sizes, weights), tables, TrainBatch(**batch), objective)[0]

    @jax.jit
    def step(weights, state, batch):
        updates, state = optimizer.update(jax.grad(loss)(weights, batch), state)
        return optax.apply_updates(weights, updates), state

    with fault:
        weights = dflash_weights.random_weights(sizes, jax.random.key(0))
        state = optimizer.init(weights)
        for number in range(STEPS):
            weights, state = step(weights, state, batches.at(number))
        return weights, evaluate(DraftModel(sizes, weights), tables, splits["heldout"]).texts


@contextlib.contextmanager
def patched(module: object, name: str, function: Callable) -> Iterator[None]:
    """`module.name` replaced for a while."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, function)
        yield


def _tap(split: CacheSplit, target: Path, layers: tuple[int, ...]) -> None:
    """Let a split give the features of other layers than its cache has."""
    sequences = split.read(range(split.num_sequences), features=False)
    texts = [one.token_ids.tolist() for one in sequences]
    taken = dict(capture(read_target(target, WeightFormat()), layers, texts))
    full = [dataclasses.replace(one, features=taken[index].features) for index, one in enumerate(sequences)]
    split.read = lambda indices, **_: [full[index] for index in indices]


def _overwrite(model: Path, weights: DFlashWeights) -> None:
    for path, array in weight_paths(weights):
        place = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(model / path.replace(".", "/"))}}
        tensorstore.open(place, open=True).result().write(np.asarray(array)).result()
