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
import tiny_loop

from pipeline import artifacts, lineage
from pipeline.config import PipelineConfig
from pipeline.dflash import blocks, scored
from pipeline.dflash.scored import ScoredText
from pipeline.export.run_directory import read_checkpoint
from pipeline.model import checkpoints, hf_draft
from pipeline.model import draft as draft_model
from pipeline.model.draft import DraftConfig, DraftWeights
from pipeline.model.gpt_oss_weights import WeightsForm
from pipeline.teacher_cache.capture import capture
from pipeline.teacher_cache.store import CacheSplit, open_split
from pipeline.train.batches import Batches
from pipeline.train.evaluate import evaluate
from pipeline.train.loss import Batch, draft_loss

STEPS, LEARNING_RATE = 250, 6e-3
_UNUSED_SIZES = itertools.count(100_000)


@dataclasses.dataclass(frozen=True)
class Trained:
    """What the right training left."""

    config: PipelineConfig
    target: lineage.Target
    checkpoint: artifacts.Artifact
    sizes: DraftConfig
    weights: DraftWeights
    texts: Sequence[ScoredText]

    @classmethod
    def read(cls) -> "Trained":
        """From the loop's directories."""
        config = tiny_loop.copy(tiny_loop.trained())
        target = lineage.target(config)
        checkpoint = lineage.checkpoint(config, target)
        sizes = lineage.own_draft_config(checkpoint)
        weights = read_checkpoint(run_of(checkpoint.path), sizes)
        return cls(config, target, checkpoint, sizes, weights, scored.read(checkpoint.path / scored.FILE))


def run_of(checkpoint: Path) -> Path:
    """The directory of its weights."""
    (found,) = checkpoint.glob("run-*")
    return found


def seal(
    trained: Trained,
    path: Path,
    config: PipelineConfig,
    *,
    weights: DraftWeights | None = None,
    texts: Sequence[ScoredText] | None = None,
    sizes: DraftConfig | None = None,
) -> PipelineConfig:
    """A checkpoint at `path` that says it is `config`'s, of other weights, rounds or sizes when given; its config."""
    scratch = artifacts.scratch_of(path)
    shutil.copytree(trained.checkpoint.path, scratch)
    (scratch / artifacts.MANIFEST).unlink()
    sizes = sizes or lineage.draft_config(config, trained.target)
    artifacts.write_json(scratch / lineage.DRAFT_CONFIG, hf_draft.config_to_hf(sizes, "float32", {}))
    if weights is not None:
        _overwrite(run_of(scratch) / "model", weights)
    if texts is not None:
        total = scored.acceptance_of(texts, sizes.block_size)
        evaluation = json.loads((scratch / lineage.EVALUATION).read_text())
        evaluation["heldout"] |= {"histogram": list(total.histogram), **total.metrics()}
        artifacts.write_json(scratch / lineage.EVALUATION, evaluation)
        artifacts.write_bytes(scratch / scored.FILE, scored.to_lines(texts))
    contract = lineage.draft_contract(config, trained.target, {}).to_json()
    artifacts.seal(path, kind=lineage.CHECKPOINT, settings=trained.checkpoint.settings, contract=contract)
    config = tiny_loop.copy(config)
    config.train.path = str(path)
    return config


def train(
    trained: Trained,
    config: PipelineConfig,
    fault: contextlib.AbstractContextManager,
    *,
    embedding_is_head: bool = False,
) -> tuple[DraftWeights, Sequence[ScoredText]]:
    """Train the draft of `config` under a fault from the beginning, and score the held-out texts under it."""
    cache = lineage.teacher_cache(trained.config, trained.target)
    splits = {name: open_split(cache.path, name) for name in ("train", "heldout")}
    sizes = lineage.draft_config(config, trained.target)
    if sizes.tapped_layers != trained.sizes.tapped_layers:
        for split in splits.values():
            _tap(split, trained.target.path, sizes.tapped_layers)
    embedding, head = checkpoints.load_ends(trained.target.path, jnp.float32)
    head = embedding.T if embedding_is_head else head
    # another model to jit, else the evaluation would run as it was traced without the fault
    sizes = dataclasses.replace(sizes, max_position_embeddings=next(_UNUSED_SIZES))
    batches = Batches(splits["train"], num_sequences=8, num_anchors=16, seed=1)
    slot_weights = blocks.slot_weights(sizes.block_size, blocks.default_decay(sizes.block_size))
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, STEPS))

    def loss(weights: DraftWeights, batch: dict[str, np.ndarray]) -> jax.Array:
        return draft_loss(weights, sizes, embedding, head, Batch(**batch), slot_weights)[0]

    @jax.jit
    def step(weights, state, batch):
        updates, state = optimizer.update(jax.grad(loss)(weights, batch), state)
        return optax.apply_updates(weights, updates), state

    with fault:
        weights = draft_model.random_weights(sizes, jax.random.key(0))
        state = optimizer.init(weights)
        for number in range(STEPS):
            weights, state = step(weights, state, batches.at(number))
        return weights, evaluate(weights, sizes, embedding, head, splits["heldout"]).texts


@contextlib.contextmanager
def patched(module: object, name: str, function: Callable) -> Iterator[None]:
    """`module.name` replaced for a while."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, function)
        yield


def _tap(split: CacheSplit, target: Path, layers: tuple[int, ...]) -> None:
    """Let a split give the features of other layers than its cache has."""
    model, weights = checkpoints.load_target(target, WeightsForm())
    sequences = split.read(range(split.num_sequences), features=False)
    taken = dict(capture(weights, model, layers, [one.token_ids.tolist() for one in sequences]))
    full = [dataclasses.replace(one, features=taken[index].features) for index, one in enumerate(sequences)]
    split.read = lambda indices, **_: [full[index] for index in indices]


def _overwrite(model: Path, weights: DraftWeights) -> None:
    for path, array in checkpoints.weight_paths(weights):
        place = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(model / path.replace(".", "/"))}}
        tensorstore.open(place, open=True).result().write(np.asarray(array)).result()
