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
from pipeline.model.draft import DraftConfig, DraftWeights
from pipeline.teacher_cache.store import open_split
from pipeline.train.batches import Batches
from pipeline.train.evaluate import score
from pipeline.train.loss import Batch, draft_loss

REFIT_STEPS, REFIT_RATE = 120, 4e-3
RUN = f"run-{tiny_loop.STEPS}"
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
        weights = read_checkpoint(checkpoint.path / RUN, sizes)
        return cls(config, target, checkpoint, sizes, weights, scored.read(checkpoint.path / scored.FILE))


def seal(
    trained: Trained,
    path: Path,
    config: PipelineConfig,
    *,
    weights: DraftWeights | None = None,
    texts: Sequence[ScoredText] | None = None,
) -> PipelineConfig:
    """A checkpoint at `path` that says it is `config`'s, of other weights or rounds when given; its configuration."""
    scratch = artifacts.scratch_of(path)
    shutil.copytree(trained.checkpoint.path, scratch)
    (scratch / artifacts.MANIFEST).unlink()
    sizes = lineage.draft_config(config, trained.target)
    artifacts.write_json(scratch / lineage.DRAFT_CONFIG, hf_draft.config_to_hf(sizes, "float32", {}))
    if weights is not None:
        _overwrite(scratch / RUN / "model", weights)
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


def refit(
    trained: Trained, fault: contextlib.AbstractContextManager, *, embedding_is_head: bool = False
) -> tuple[DraftWeights, list[ScoredText]]:
    """Train on from the right weights under a fault, and score the held-out texts under it."""
    cache = lineage.teacher_cache(trained.config, trained.target)
    splits = {name: open_split(cache.path, name) for name in ("train", "heldout")}
    embedding, head = checkpoints.load_ends(trained.target.path, jnp.float32)
    head = embedding.T if embedding_is_head else head
    # another model to jit, else the evaluation would run as it was traced without the fault
    sizes = dataclasses.replace(trained.sizes, max_position_embeddings=next(_UNUSED_SIZES))
    batches = Batches(splits["train"], num_sequences=8, num_anchors=16, seed=1)
    slot_weights = blocks.slot_weights(sizes.block_size, blocks.default_decay(sizes.block_size))
    optimizer = optax.adam(optax.cosine_decay_schedule(REFIT_RATE, REFIT_STEPS))

    def loss(weights: DraftWeights, batch: dict[str, np.ndarray]) -> jax.Array:
        return draft_loss(weights, sizes, embedding, head, Batch(**batch), slot_weights)[0]

    @jax.jit
    def step(weights, state, batch):
        updates, state = optimizer.update(jax.grad(loss)(weights, batch), state)
        return optax.apply_updates(weights, updates), state

    with fault:
        weights, state = trained.weights, optimizer.init(trained.weights)
        for number in range(REFIT_STEPS):
            weights, state = step(weights, state, batches.at(number))
        return weights, score(weights, sizes, embedding, head, splits["heldout"])


@contextlib.contextmanager
def patched(module: object, name: str, function: Callable) -> Iterator[None]:
    """`module.name` replaced for a while."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, function)
        yield


def _overwrite(model: Path, weights: DraftWeights) -> None:
    for path, array in checkpoints.weight_paths(weights):
        place = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(model / path.replace(".", "/"))}}
        tensorstore.open(place, open=True).result().write(np.asarray(array)).result()
