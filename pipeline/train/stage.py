"""`stage=train`: makes a trained draft from a teacher cache: EasyDeL's best run directory and its scores."""

import contextlib
import dataclasses
import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from pipeline import distributed
from pipeline.artifacts import artifact
from pipeline.artifacts.artifact import Artifact
from pipeline.artifacts.contract import Contract
from pipeline.artifacts.files import disk_errors, require_free_space, write_json
from pipeline.artifacts.storage import BucketPath, StoragePath
from pipeline.config.choices import FeatureSource
from pipeline.config.fields import CHECKPOINT, TARGET, TEACHER_CACHE
from pipeline.config.schema import PipelineConfig, TrainConfig
from pipeline.cost import chips, train_flops
from pipeline.dflash.acceptance import MEMORISED, memorises
from pipeline.errors import PipelineError
from pipeline.model.dflash.config import DFlashConfig
from pipeline.model.dflash.model import DraftModel
from pipeline.model.dflash.weights import DFlashWeights, weight_shapes
from pipeline.model.hf import dflash as hf_dflash
from pipeline.model.hf.directory import read_draft, read_embedding_and_head
from pipeline.store.checkpoint_files import DATA, DRAFT_CONFIG, EVALUATION
from pipeline.store.reader import CacheSplit, open_split
from pipeline.tracking.run import Run
from pipeline.train.accumulation import require_divisible_batch
from pipeline.train.data import summary
from pipeline.train.data.live_target import LiveTarget
from pipeline.train.data.packed import PackedBatches
from pipeline.train.data.padded import PaddedBatches
from pipeline.train.easydel import environment
from pipeline.train.evaluation import best
from pipeline.train.evaluation.best import Evaluation
from pipeline.train.evaluation.evaluate import EVALUATED_SEQUENCES, evaluate
from pipeline.train.evaluation.score import Score
from pipeline.train.loss.vocab_shard import FrozenTables, shard_tables
from pipeline.train.monitor import DeviceCapacity, TrainMonitor, log_scores
from pipeline.train.recipe import Recipe, recipe_of
from pipeline.workspace.loading import adapter_of, load_target, runtime_for
from pipeline.workspace.workspace import Workspace

log = logging.getLogger("pipeline")

SAVED_BYTES_PER_WEIGHT = 3 * 4  # the weight and Adam's two moments, float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainInputs:
    """Holds what a training reads: texts, the whole target where it is live, and its two tables.

    `tables` returns embedding and head in a precision, on the devices of a mesh; the engine serves in `served_dtype`.
    """

    draft: DFlashConfig
    recipe: Recipe
    splits: dict[str, CacheSplit]
    live: LiveTarget | None
    tables: Callable[[jnp.dtype, Mesh], FrozenTables]
    served_dtype: jnp.dtype


def run(config: PipelineConfig, tracker: Run) -> None:
    """Trains the draft of this configuration, resumes its training, or reports that it exists."""
    workspace = Workspace(config)
    path = workspace.address(CHECKPOINT)
    if artifact.exists(path):
        _report(tracker, workspace.open(CHECKPOINT), "stands")
        return
    if isinstance(path, BucketPath):
        raise PipelineError(
            f"train.path is {path}; training writes to a disk: give it a directory, and copy that to the bucket when "
            "it is complete (stage=export reads it from there)"
        )
    # several hosts are one command, and would have to agree on who waits
    lock = contextlib.nullcontext() if distributed.is_multihost() else artifact.exclusive(path)
    with disk_errors(path), lock:
        if not artifact.exists(path):
            _train(workspace, path, tracker)
    _report(tracker, workspace.open(CHECKPOINT), "is made")


def _train(workspace: Workspace, path: Path, tracker: Run) -> None:
    config, target = workspace.config, workspace.target
    cache = workspace.open(TEACHER_CACHE)
    parents = {TARGET: target.fingerprint, TEACHER_CACHE: cache.fingerprint}
    contract = workspace.contract(CHECKPOINT, workspace.provenance(CHECKPOINT, parents))
    scratch = Path(str(artifact.scratch_of(path)))
    if distributed.is_primary():
        _open(path, contract, workspace.draft_config)
    distributed.barrier("training begins")
    if not _is_over(scratch, config.train.steps):
        _fit(scratch, workspace, _inputs(workspace, cache.path), tracker)
    if distributed.is_primary():
        found = best.finalize(scratch)
        write_json(scratch / DRAFT_CONFIG, hf_dflash.config_to_hf(workspace.draft_config, "float32", {}))
        write_json(scratch / EVALUATION, best.as_json(found))
        write_json(scratch / DATA, summary.summarize(cache))
        workspace.seal(CHECKPOINT, contract, {TEACHER_CACHE: cache})
    distributed.barrier("training is over")


def _open(path: Path, contract: Contract, draft: DFlashConfig) -> None:
    """Makes or finds the directory to train in; raises PipelineError when a training of other settings began in it."""
    sizes = [leaf.size for leaf in jax.tree.leaves(weight_shapes(draft))]
    needed = 3 * SAVED_BYTES_PER_WEIGHT * sum(sizes)  # the best, the last, and the one being written
    require_free_space(path, needed, "training (three checkpoints)")
    scratch = artifact.open_scratch(path, resume=True)
    begun = scratch / artifact.CONTRACT
    wanted = contract.to_json()
    if begun.is_file() and _decides(json.loads(begun.read_text())) != _decides(json.loads(json.dumps(wanted))):
        raise PipelineError(
            f"{scratch} holds the unfinished training of a draft with other settings (see its {begun.name}); "
            "delete it, or give another train.path"
        )
    write_json(begun, wanted)


def _decides(contract: dict[str, Any]) -> dict[str, Any]:
    """Returns the part of a contract that decides the draft: no commit and no package versions."""
    provenance = {key: contract["provenance"][key] for key in ("config", "parents")}
    return {**contract, "provenance": provenance}


def _is_over(scratch: Path, steps: int) -> bool:
    """Returns whether the last step's draft is evaluated already, and only the end of the stage is missing."""
    return any(evaluation.step == steps for evaluation in best.read_evaluations(scratch))


def _inputs(workspace: Workspace, cache: StoragePath) -> TrainInputs:
    config, target, draft = workspace.config, workspace.target, workspace.draft_config
    served = jnp.dtype(config.target.precision.value)
    recipe = recipe_of(config.train, draft, config.seed, served)
    _require_devices(recipe)
    live = None
    if config.train.features is FeatureSource.live:
        runtime = runtime_for(config.mesh, target.path)
        model = load_target(config.target, target.path, runtime)
        live = LiveTarget(model, draft.tapped_layers, runtime, distils=recipe.objective.distillation > 0)

    @functools.cache  # the trainer and every evaluation take the same; no device holds a whole table
    def tables(dtype: jnp.dtype, mesh: Mesh) -> FrozenTables:
        return shard_tables(*read_embedding_and_head(target.path, dtype, adapter_of(config.target)), mesh)

    return TrainInputs(
        draft=draft,
        recipe=recipe,
        splits={split: open_split(cache, split) for split in ("train", "heldout")},
        live=live,
        tables=tables,
        served_dtype=served,
    )


def _require_devices(recipe: Recipe) -> None:
    """Raises PipelineError when the devices, or the rows of a batch, cannot be split as configured."""
    split, num_devices = recipe.split, jax.device_count()
    rest = split.data * split.tensor
    fsdp = num_devices // rest if split.fsdp == -1 else split.fsdp
    if rest * fsdp != num_devices:
        raise PipelineError(
            f"train.mesh.data x train.mesh.fsdp x train.mesh.tensor is {split.data} x {fsdp} x {split.tensor} = "
            f"{rest * fsdp}; there are {num_devices} devices: change one of them, or leave all three out"
        )
    require_divisible_batch(recipe.batch_sequences, recipe.accumulation, data=split.data, fsdp=fsdp)


def _fit(scratch: Path, workspace: Workspace, inputs: TrainInputs, tracker: Run) -> None:
    environment.prepare()
    from pipeline.train.easydel import trainer  # imports EasyDeL, which only now can be

    config, recipe = workspace.config, inputs.recipe
    batches = _batches(inputs.splits["train"], config.train, config.seed)
    evaluations = best.read_evaluations(scratch)
    if distributed.is_primary():
        best.link_best(scratch)
    setup = trainer.TrainingSetup(
        draft=inputs.draft,
        recipe=recipe,
        tables=functools.partial(inputs.tables, jnp.dtype(recipe.dtype)),
        batch_at=batches.at,
        initial=_initial(workspace),
        complete=None if inputs.live is None else inputs.live.complete,
    )
    with TrainMonitor(
        tracker,
        steps=recipe.steps,
        log_steps=config.train.log_steps,
        capacity=_capacity(inputs, config.train, batches),
        evaluates_at=recipe.evaluates_at,
        evaluate=functools.partial(_evaluate, scratch, inputs),
        last_evaluated=max((evaluation.step for evaluation in evaluations), default=0),
    ) as monitor:
        trainer.fit(scratch, setup, monitor.begin, monitor.step)


def _initial(workspace: Workspace) -> DFlashWeights | None:
    """Reads the weights of `train.init`, in float32; None without one."""
    directory = workspace.initial_draft
    return None if directory is None else read_draft(directory, jnp.float32).weights


def _batches(split: CacheSplit, train: TrainConfig, seed: int) -> PaddedBatches | PackedBatches:
    """Returns batches of rows of one sequence each, or of `train.pack_tokens` tokens."""
    options: dict[str, Any] = {
        "num_anchors": train.anchors_per_sequence,
        "seed": seed,
        "host": (jax.process_index(), jax.process_count()),
    }
    if train.pack_tokens is None:
        return PaddedBatches(split, num_sequences=train.batch_sequences, **options)
    batches = PackedBatches(split, num_rows=train.batch_sequences, row_tokens=train.pack_tokens, **options)
    log.info(
        "train: %d sequences are packed into %d rows of %d tokens (%.0f%% full) and %d blocks",
        split.num_sequences,
        batches.num_filled,
        train.pack_tokens,
        100 * split.num_tokens.sum() / (batches.num_filled * train.pack_tokens),
        batches.row_anchors,
    )
    return batches


def _capacity(inputs: TrainInputs, train: TrainConfig, batches: PaddedBatches | PackedBatches) -> DeviceCapacity:
    split = inputs.splits["train"]
    mean_tokens = float(split.num_tokens.mean())
    needed = train_flops.step_flops(
        inputs.draft,
        num_sequences=batches.sequences_per_step,
        num_positions=mean_tokens,
        num_anchors=train.anchors_per_sequence,
        context_tokens=float((split.num_tokens + split.prompt_tokens).mean()) / 2,
    )
    chip = chips.chip_of(jax.devices()[0].device_kind)
    return DeviceCapacity(needed, None if chip is None else chip.flops_per_second * jax.device_count())


def _evaluate(scratch: Path, inputs: TrainInputs, step: int, weights: DFlashWeights) -> Evaluation:
    """Scores a draft, in the precision it is served in, on held-out texts and on as many train texts."""
    weights = jax.tree.map(lambda array: array.astype(inputs.served_dtype), weights)
    sharding = weights.norm.sharding
    assert isinstance(sharding, NamedSharding), "EasyDeL trains on a mesh, of one device too"
    assert isinstance(sharding.mesh, Mesh), "weights are on devices"
    draft, tables = DraftModel(inputs.draft, weights), inputs.tables(inputs.served_dtype, sharding.mesh)
    count = min(EVALUATED_SEQUENCES, *(split.num_sequences for split in inputs.splits.values()))
    with_features = None if inputs.live is None else inputs.live.with_features
    scores: dict[str, Score] = {
        name: evaluate(draft, tables, split, num_sequences=count, with_features=with_features)
        for name, split in inputs.splits.items()
    }
    return best.record(scratch, step, scores)


def _report(tracker: Run, checkpoint: Artifact, verb: str) -> None:
    found = json.loads((checkpoint.path / EVALUATION).read_text())
    step, steps = found["step"], checkpoint.settings["train.steps"]
    scores = {split: Score.from_json(found[split]) for split in ("heldout", "train")}
    data = json.loads((checkpoint.path / DATA).read_text())["splits"]["train"]
    parent = checkpoint.parents[TEACHER_CACHE]
    tracker.log_dataset(
        "teacher cache", parent.fingerprint, source=f"{TEACHER_CACHE} {parent.key}", context="training", profile=data
    )
    tracker.link_model("draft", checkpoint.fingerprint, is_output=True, tags={"checkpoint": str(checkpoint.path)})
    log_scores(tracker, scores, step)
    tracker.log_json(artifact.CONTRACT, checkpoint.contract)
    tracker.log_json(EVALUATION, found)
    heldout, trained = scores["heldout"].total, scores["train"].total
    log.info(
        "train: the draft %s at %s; the best of its evaluations is that of step %d of %d; accept_length %.3f of %d on "
        "held-out texts, %.3f on train texts",
        verb,
        checkpoint.path,
        step,
        steps,
        heldout.accept_length,
        heldout.block_size,
        trained.accept_length,
    )
    if memorises(trained.accept_length, heldout.accept_length):
        tracker.set_tag("memorised", "true")
        log.warning(
            "train: accept_length on train texts is more than %.1f times that on held-out ones: the draft "
            "memorises; give it more prompts (prompts.count) or fewer steps (train.steps)",
            MEMORISED,
        )
