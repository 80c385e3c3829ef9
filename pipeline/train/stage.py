"""`stage=train`: teacher cache -> trained draft, as EasyDeL's best run directory and what it scored."""

import dataclasses
import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from pipeline import artifacts, chips, hosts, lineage
from pipeline.artifacts import Artifact, PipelineError
from pipeline.config import FeatureSource, LossWeights, Optimizer, PipelineConfig, TrainConfig
from pipeline.dflash import blocks
from pipeline.dflash.acceptance import MEMORISED, memorises
from pipeline.dflash.contract import Contract
from pipeline.lineage import Target
from pipeline.machine import machine, read_target
from pipeline.model import checkpoints, hf_draft
from pipeline.model.draft import DraftConfig, DraftWeights, weight_shapes
from pipeline.model.linear import Kernel
from pipeline.places import BucketPath
from pipeline.teacher_cache.store import CacheSplit, open_split
from pipeline.tracking import Run
from pipeline.train import best, data, environment, flops, vocabulary
from pipeline.train.accumulation import require_divisible
from pipeline.train.batches import Batches
from pipeline.train.best import Evaluation
from pipeline.train.evaluate import evaluate
from pipeline.train.journal import Capacity, Journal, log_scores
from pipeline.train.live import LiveTarget
from pipeline.train.packed_batches import PackedBatches
from pipeline.train.recipe import Recipe, Split
from pipeline.train.score import Score

log = logging.getLogger("pipeline")

EVALUATED_SEQUENCES = 256  # of a split, at most
SAVED_BYTES_PER_WEIGHT = 3 * 4  # the weight and Adam's two moments, float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Given:
    """What a training is given: texts, the whole target where it is live, and its two ends.

    `ends` gives embedding and head in a precision, on the devices of a mesh; the engine serves in `served_dtype`.
    """

    draft: DraftConfig
    recipe: Recipe
    splits: dict[str, CacheSplit]
    live: LiveTarget | None
    ends: Callable[[jnp.dtype, Mesh], tuple[Array, Kernel]]
    served_dtype: jnp.dtype


def run(config: PipelineConfig, tracker: Run) -> None:
    """Train the draft of this configuration, or go on with it, or say that it stands."""
    target = lineage.target(config)
    path = lineage.checkpoint_address(config, target)
    if artifacts.exists(path):
        _report(tracker, lineage.checkpoint(config, target), "stands")
        return
    if isinstance(path, BucketPath):
        raise PipelineError(
            f"train.path is {path}; training writes to a disk: give it a directory, and copy that to the bucket when "
            "it is complete (stage=export reads it from there)"
        )
    cache = lineage.teacher_cache(config, target)
    draft = lineage.draft_config(config, target)
    settings = lineage.checkpoint_settings(config, target, cache.fingerprint)
    parents = {"target": target.fingerprint, "teacher_cache": cache.fingerprint}
    contract = lineage.draft_contract(config, target, artifacts.provenance("train", settings, parents))
    with artifacts.disk_errors(path):
        scratch = artifacts.scratch_of(path)
        if hosts.is_first():
            _open(path, contract, draft)
        hosts.meet("training begins")
        if not _is_over(scratch, config.train.steps):
            _fit(scratch, config, _given(config, target, cache.path, draft), tracker)
        if hosts.is_first():
            found = best.take(scratch)
            artifacts.write_json(scratch / lineage.DRAFT_CONFIG, hf_draft.config_to_hf(draft, "float32", {}))
            artifacts.write_json(scratch / lineage.EVALUATION, best.as_json(found))
            artifacts.write_json(scratch / lineage.DATA, data.told(cache))
            artifacts.seal(path, kind=lineage.CHECKPOINT, settings=settings, contract=contract.to_json())
        hosts.meet("training is over")
    _report(tracker, lineage.checkpoint(config, target), "is made")


def recipe_of(train: TrainConfig, draft: DraftConfig, seed: int, dtype: jnp.dtype) -> Recipe:
    """The recipe of this configuration; `dtype` is the precision of the arithmetic where the recipe has none."""
    given = (train.data, train.fsdp, train.tensor)
    split = Split() if given == (None, None, None) else Split(*(size or 1 for size in given))
    return Recipe(
        steps=train.steps,
        batch_sequences=train.batch_sequences,
        muon=train.optimizer is Optimizer.muon,
        learning_rate=train.learning_rate,
        final_learning_rate=train.final_learning_rate,
        warmup_ratio=train.warmup_ratio,
        beta1=train.beta1,
        beta2=train.beta2,
        weight_decay=train.weight_decay,
        clip_grad=train.clip_grad,
        ema_decay=train.ema_decay,
        loss_decay=train.loss_decay or blocks.default_decay(draft.block_size),
        checkpoint_steps=train.checkpoint_steps,
        eval_steps=train.eval_steps,
        seed=seed,
        dtype=dtype if train.precision is None else jnp.dtype(train.precision.value),
        remat=train.remat,
        split=split,
        dpace_smoothing=train.dpace_smoothing if train.loss_weights is LossWeights.dpace else None,
        distillation=train.distillation,
        accumulation=train.accumulation,
    )


def _open(path: Path, contract: Contract, draft: DraftConfig) -> None:
    """Make or find the directory to train in. PipelineError when what was begun there has other settings than ours."""
    sizes = [leaf.size for leaf in jax.tree.leaves(weight_shapes(draft))]
    needed = 3 * SAVED_BYTES_PER_WEIGHT * sum(sizes)  # the best, the last, and the one being written
    artifacts.require_free_space(path, needed, "training (three checkpoints)")
    scratch = artifacts.open_scratch(path, resume=True)
    begun = scratch / artifacts.CONTRACT
    wanted = contract.to_json()
    if begun.is_file() and _decides(json.loads(begun.read_text())) != _decides(json.loads(json.dumps(wanted))):
        raise PipelineError(
            f"{scratch} holds the unfinished training of a draft with other settings (see its {begun.name}); "
            "delete it, or give another train.path"
        )
    artifacts.write_json(begun, wanted)


def _decides(contract: dict[str, Any]) -> dict[str, Any]:
    made_from = {key: contract["provenance"][key] for key in ("config", "parents")}
    return {**contract, "provenance": made_from}


def _is_over(scratch: Path, steps: int) -> bool:
    """Whether every step is made and the last draft evaluated: a kill came behind it."""
    return any(one.step == steps for one in best.read(scratch))


def _given(config: PipelineConfig, target: Target, cache: Path, draft: DraftConfig) -> Given:
    served = jnp.dtype(config.target.precision.value)
    recipe = recipe_of(config.train, draft, config.seed, served)
    _require_devices(recipe)
    live = None
    if config.train.features is FeatureSource.live:
        here = machine(config.mesh, target.path)
        model, weights = read_target(config, target.path, here)
        live = LiveTarget(weights, model, draft.tapped_layers, here, distils=recipe.distillation > 0)

    @functools.cache  # the trainer and every evaluation take the same; nobody keeps a table whole on one device
    def ends(dtype: jnp.dtype, mesh: Mesh) -> tuple[Array, Kernel]:
        return vocabulary.share_out(*checkpoints.load_ends(target.path, dtype), mesh)

    return Given(
        draft=draft,
        recipe=recipe,
        splits={split: open_split(cache, split) for split in ("train", "heldout")},
        live=live,
        ends=ends,
        served_dtype=served,
    )


def _require_devices(recipe: Recipe) -> None:
    """Raise PipelineError when the devices, or the rows of a batch, cannot be split as was said."""
    split, num_devices = recipe.split, jax.device_count()
    rest = split.data * split.tensor
    fsdp = num_devices // rest if split.fsdp == -1 else split.fsdp
    if rest * fsdp != num_devices:
        raise PipelineError(
            f"train.data x train.fsdp x train.tensor is {split.data} x {fsdp} x {split.tensor} = {rest * fsdp}; there "
            f"are {num_devices} devices: change one of them, or leave all three out"
        )
    require_divisible(recipe.batch_sequences, recipe.accumulation, data=split.data, fsdp=fsdp)


def _fit(scratch: Path, config: PipelineConfig, given: Given, tracker: Run) -> None:
    environment.prepare()
    from pipeline.train import trainer  # imports EasyDeL, which only now can be

    train, recipe = config.train, given.recipe
    batches = _batches(given.splits["train"], train, config.seed)
    evaluations = best.read(scratch)
    if hosts.is_first():
        best.keep(scratch)
    with Journal(
        tracker,
        steps=train.steps,
        log_steps=train.log_steps,
        capacity=_capacity(given, train, batches),
        evaluates_at=recipe.evaluates_at,
        evaluate=functools.partial(_evaluate, scratch, given),
        last_evaluated=max((one.step for one in evaluations), default=0),
    ) as journal:
        trainer.fit(
            scratch,
            given.draft,
            recipe,
            functools.partial(given.ends, recipe.dtype),
            batches.at,
            journal.begin,
            journal.step,
            initial=_initial(config),
            complete=None if given.live is None else given.live.complete,
        )


def _initial(config: PipelineConfig) -> DraftWeights | None:
    """The weights of `train.init`, in float32."""
    directory = lineage.initial_draft(config)
    return None if directory is None else checkpoints.load_draft(directory, jnp.float32)[1]


def _batches(split: CacheSplit, train: TrainConfig, seed: int) -> Batches | PackedBatches:
    """Rows of one sequence each, or of `train.pack_tokens` tokens."""
    given = {
        "num_anchors": train.anchors_per_sequence,
        "seed": seed,
        "host": (jax.process_index(), jax.process_count()),
    }
    if train.pack_tokens is None:
        return Batches(split, num_sequences=train.batch_sequences, **given)
    batches = PackedBatches(split, num_rows=train.batch_sequences, row_tokens=train.pack_tokens, **given)
    log.info(
        "train: %d sequences are packed into %d rows of %d tokens (%.0f%% full) and %d blocks",
        split.num_sequences,
        batches.num_filled,
        train.pack_tokens,
        100 * split.num_tokens.sum() / (batches.num_filled * train.pack_tokens),
        batches.row_anchors,
    )
    return batches


def _capacity(given: Given, train: TrainConfig, batches: Batches | PackedBatches) -> Capacity:
    split = given.splits["train"]
    mean_tokens = float(split.num_tokens.mean())
    needed = flops.step_flops(
        given.draft,
        num_sequences=batches.sequences_per_step,
        num_positions=mean_tokens,
        num_anchors=train.anchors_per_sequence,
        context_tokens=float((split.num_tokens + split.prompt_tokens).mean()) / 2,
    )
    chip = chips.chip_of(jax.devices()[0].device_kind)
    return Capacity(needed, None if chip is None else chip.flops_per_second * jax.device_count())


def _evaluate(scratch: Path, given: Given, step: int, weights: DraftWeights) -> Evaluation:
    """Score a draft, in the precision it is served in, on held-out texts and on as many train texts."""
    weights = jax.tree.map(lambda array: array.astype(given.served_dtype), weights)
    mesh = weights.norm.sharding.mesh
    ends = given.ends(given.served_dtype, mesh)
    count = min(EVALUATED_SEQUENCES, *(split.num_sequences for split in given.splits.values()))
    filled = None if given.live is None else given.live.filled
    scores: dict[str, Score] = {
        name: evaluate(weights, given.draft, *ends, split, num_sequences=count, filled=filled, mesh=mesh)
        for name, split in given.splits.items()
    }
    return best.add(scratch, step, scores)


def _report(tracker: Run, made: Artifact, verb: str) -> None:
    found = json.loads((made.path / lineage.EVALUATION).read_text())
    step, steps = found["step"], made.settings["train"]["steps"]
    scores = {split: Score.from_json(found[split]) for split in ("heldout", "train")}
    log_scores(tracker, scores, step)
    tracker.log_json(artifacts.CONTRACT, made.contract)
    tracker.log_json(lineage.EVALUATION, found)
    heldout, trained = scores["heldout"].total, scores["train"].total
    log.info(
        "train: the draft %s at %s; the best of its evaluations is that of step %d of %d; accept_length %.3f of %d on "
        "held-out texts, %.3f on train texts",
        verb,
        made.path,
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
