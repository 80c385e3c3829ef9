"""`stage=train`: teacher cache -> trained draft, as EasyDeL's last run directory and what it scored."""

import functools
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pipeline import artifacts, lineage
from pipeline.artifacts import Artifact, PipelineError
from pipeline.config import LossWeights, PipelineConfig, TrainConfig
from pipeline.dflash import blocks
from pipeline.dflash.acceptance import Acceptance
from pipeline.dflash.contract import Contract
from pipeline.model import checkpoints, hf_draft
from pipeline.model.draft import DraftConfig, DraftWeights, weight_shapes
from pipeline.model.linear import Kernel
from pipeline.teacher_cache.store import CacheSplit, open_split
from pipeline.tracking import Run
from pipeline.train import environment, runs
from pipeline.train.batches import Batches
from pipeline.train.evaluate import evaluate
from pipeline.train.journal import Journal, log_acceptance
from pipeline.train.recipe import Recipe

log = logging.getLogger("pipeline")

EVALUATED_SEQUENCES = 256  # of a split, at most
MEMORISED = 1.3  # accept_length on train texts over that on held-out ones, from which on we warn
SAVED_BYTES_PER_WEIGHT = 3 * 4  # the weight and Adam's two moments, float32


def run(config: PipelineConfig, tracker: Run) -> None:
    """Train the draft of this configuration, or go on with it, or say that it stands."""
    target = lineage.target(config)
    path = lineage.checkpoint_address(config, target)
    if artifacts.exists(path):
        _report(tracker, lineage.checkpoint(config, target), "stands")
        return
    cache = lineage.teacher_cache(config, target)
    draft = lineage.draft_config(config, target)
    settings = lineage.checkpoint_settings(config, target, cache.fingerprint)
    parents = {"target": target.fingerprint, "teacher_cache": cache.fingerprint}
    contract = lineage.draft_contract(config, target, artifacts.provenance("train", settings, parents))
    with artifacts.disk_errors(path):
        scratch = _scratch(path, contract, draft)
        dtype = jnp.dtype(config.target.precision.value)
        frozen = _frozen(target.path, dtype)
        splits = {split: open_split(cache.path, split) for split in ("train", "heldout")}
        weights = _fit(scratch, draft, config.train, config.seed, dtype, frozen, splits, tracker)
        evaluation = _evaluated(weights, draft, dtype, frozen, splits)
        _keep_only(scratch, runs.path_of(scratch, config.train.steps))
        artifacts.write_json(scratch / lineage.DRAFT_CONFIG, hf_draft.config_to_hf(draft, "float32", {}))
        artifacts.write_json(scratch / lineage.EVALUATION, evaluation)
        made = artifacts.seal(path, kind=lineage.CHECKPOINT, settings=settings, contract=contract.to_json())
    _report(tracker, made, "is made")


def recipe_of(train: TrainConfig, draft: DraftConfig, seed: int, dtype: jnp.dtype) -> Recipe:
    """The recipe of this configuration."""
    return Recipe(
        steps=train.steps,
        batch_sequences=train.batch_sequences,
        learning_rate=train.learning_rate,
        warmup_ratio=train.warmup_ratio,
        weight_decay=train.weight_decay,
        clip_grad=train.clip_grad,
        loss_decay=train.loss_decay or blocks.default_decay(draft.block_size),
        checkpoint_steps=train.checkpoint_steps,
        seed=seed,
        dtype=dtype,
        remat=train.remat,
        dpace_smoothing=train.dpace_smoothing if train.loss_weights is LossWeights.dpace else None,
        distillation=train.distillation,
        accumulation=train.accumulation,
    )


def _scratch(path: Path, contract: Contract, draft: DraftConfig) -> Path:
    """The directory to train in. PipelineError when what was begun there has other settings than ours."""
    sizes = [leaf.size for leaf in jax.tree.leaves(weight_shapes(draft))]
    needed = 2 * SAVED_BYTES_PER_WEIGHT * sum(sizes)  # the last checkpoint goes when the next one is complete
    artifacts.require_free_space(path, needed, "training (two checkpoints)")
    scratch = artifacts.open_scratch(path, resume=True)
    begun = scratch / artifacts.CONTRACT
    wanted = contract.to_json()
    if begun.is_file() and _decides(json.loads(begun.read_text())) != _decides(json.loads(json.dumps(wanted))):
        raise PipelineError(
            f"{scratch} holds the unfinished training of a draft with other settings (see its {begun.name}); "
            "delete it, or give another train.path"
        )
    artifacts.write_json(begun, wanted)
    return scratch


def _decides(contract: dict[str, Any]) -> dict[str, Any]:
    made_from = {key: contract["provenance"][key] for key in ("config", "parents")}
    return {**contract, "provenance": made_from}


def _frozen(directory: Path, dtype: jnp.dtype) -> tuple[Array, Kernel]:
    """The target's embedding and head; the rest of it is not needed."""
    return checkpoints.load_ends(directory, dtype)


def _fit(
    scratch: Path,
    draft: DraftConfig,
    train: TrainConfig,
    seed: int,
    dtype: jnp.dtype,
    frozen: tuple[Array, Kernel],
    splits: dict[str, CacheSplit],
    tracker: Run,
) -> DraftWeights:
    environment.prepare()
    from pipeline.train import trainer  # imports EasyDeL, which only now can be

    recipe = recipe_of(train, draft, seed, dtype)
    batches = Batches(
        splits["train"],
        num_sequences=train.batch_sequences,
        num_anchors=train.anchors_per_sequence,
        seed=seed,
    )
    score = functools.partial(_score, draft=draft, dtype=dtype, frozen=frozen, split=splits["heldout"])
    with Journal(
        tracker, steps=train.steps, log_steps=train.log_steps, eval_steps=train.eval_steps, evaluate=score
    ) as journal:
        return trainer.fit(scratch, draft, recipe, *frozen, batches.at, journal.begin, journal.step)


def _score(
    weights: DraftWeights,
    draft: DraftConfig,
    dtype: jnp.dtype,
    frozen: tuple[Array, Kernel],
    split: CacheSplit,
    num_sequences: int = EVALUATED_SEQUENCES,
) -> Acceptance:
    weights = jax.tree.map(lambda array: array.astype(dtype), weights)  # the precision it is served in
    return evaluate(weights, draft, *frozen, split, num_sequences=num_sequences)


def _evaluated(
    weights: DraftWeights,
    draft: DraftConfig,
    dtype: jnp.dtype,
    frozen: tuple[Array, Kernel],
    splits: dict[str, CacheSplit],
) -> dict[str, Any]:
    """Acceptance on held-out texts and on as many train texts, as evaluation.json has it."""
    count = min(EVALUATED_SEQUENCES, *(split.num_sequences for split in splits.values()))
    found = {name: _score(weights, draft, dtype, frozen, split, num_sequences=count) for name, split in splits.items()}
    return {
        name: {"num_sequences": count, "histogram": list(score.histogram), **score.metrics()}
        for name, score in found.items()
    }


def _keep_only(scratch: Path, kept: Path) -> None:
    for entry in scratch.iterdir():
        if entry.is_dir() and entry != kept:
            shutil.rmtree(entry)
        elif entry.is_file() and entry.name != artifacts.CONTRACT:
            entry.unlink()


def _report(tracker: Run, made: Artifact, verb: str) -> None:
    evaluation = json.loads((made.path / lineage.EVALUATION).read_text())
    steps = made.settings["train"]["steps"]
    heldout, trained = (Acceptance(tuple(evaluation[split]["histogram"])) for split in ("heldout", "train"))
    log_acceptance(tracker, "eval", heldout, steps)
    log_acceptance(tracker, "eval_train", trained, steps)
    tracker.log_json(artifacts.CONTRACT, made.contract)
    tracker.log_artifact(made.path / lineage.EVALUATION)
    log.info(
        "train: the draft %s at %s; accept_length %.3f of %d on held-out texts, %.3f on train texts",
        verb,
        made.path,
        heldout.accept_length,
        heldout.block_size,
        trained.accept_length,
    )
    if trained.accept_length > MEMORISED * heldout.accept_length:
        log.warning(
            "train: accept_length on train texts is more than %.1f times that on held-out ones: the draft "
            "memorises; give it more prompts (prompts.count) or fewer steps (train.steps)",
            MEMORISED,
        )
