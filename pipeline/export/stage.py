"""`stage=export`: EasyDeL's run directory -> the draft as an HF directory, proved in the engine before it appears."""

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from pipeline import artifacts, lineage, places
from pipeline.artifacts import Artifact, PipelineError
from pipeline.config import PipelineConfig
from pipeline.dflash import scored
from pipeline.dflash.contract import Contract
from pipeline.dflash.scored import ScoredText
from pipeline.export.card import Training, model_card
from pipeline.export.rendering import require_rendering
from pipeline.export.run_directory import MEND, holds_weights, read_checkpoint
from pipeline.export.trial import Trial, require_agreement, run_trial
from pipeline.export.write import write_draft
from pipeline.machine import machine, read_draft, read_target
from pipeline.model import checkpoints
from pipeline.places import Place
from pipeline.prompts.chat_format import stop_token_ids
from pipeline.prompts.tokenizer import load_tokenizer
from pipeline.serve.engine import Draft
from pipeline.tracking import Run

log = logging.getLogger("pipeline")

CARD = "README.md"
TARGET_CHOICE = "target=local target.path=<the target's directory>"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def run(config: PipelineConfig, tracker: Run) -> None:
    """Export the trained draft of this configuration, or say that it stands."""
    target = lineage.target(config)
    path = lineage.export_address(config, target)
    if artifacts.exists(path):
        made = lineage.exported_draft(config, target)
        _report(tracker, made, "stands")
        require_agreement(_trial_of(made), config.export.tolerance)  # it may have been another one then
        return
    trained = lineage.checkpoint(config, target)
    sizes = lineage.own_draft_config(trained)
    evaluation = json.loads((trained.path / lineage.EVALUATION).read_text())
    texts = _texts(config, trained, target)
    weights = read_checkpoint(_run_directory(trained), sizes)
    settings = lineage.export_settings(config, trained.fingerprint)
    parents = {"target": target.fingerprint, "checkpoint": trained.fingerprint}
    provenance = artifacts.provenance("export", settings, parents)
    contract = lineage.draft_contract(config, target, provenance)
    with artifacts.disk_errors(path), _nothing_left(path):
        scratch = artifacts.open_scratch(path, resume=False)  # made in seconds: begun anew when interrupted
        parity = write_draft(scratch, sizes, weights, _token_ids(target.path))
        trial = _tried(config, scratch, target, texts)
        require_agreement(trial, config.export.tolerance)
        evaluation["engine"] = trial.to_json()
        artifacts.write_json(scratch / lineage.EVALUATION, evaluation)
        artifacts.write_bytes(
            scratch / CARD, model_card(sizes, contract, evaluation, _training(config, contract, trained)).encode()
        )
        made = artifacts.seal(path, kind=lineage.DRAFT, settings=settings, contract=contract.to_json())
    tracker.log_metrics(
        {"export/max_difference": parity.max_difference, "export/relative_error": parity.relative_error}
    )
    log.info(
        "export: weights equal the trained ones rounded to bfloat16; outputs differ by %.1e (relative RMS)",
        parity.relative_error,
    )
    _report(tracker, made, "is made")


@contextlib.contextmanager
def _nothing_left(path: Path) -> Iterator[None]:
    """A draft that is refused leaves no directory that somebody could serve by hand."""
    try:
        yield
    except PipelineError:
        shutil.rmtree(artifacts.scratch_of(path), ignore_errors=True)
        raise


def _texts(config: PipelineConfig, trained: Artifact, target: lineage.Target) -> list[ScoredText]:
    """The first held-out texts that the training evaluation read, their prompts rendered as serving does."""
    texts = scored.read(trained.path / scored.FILE)[: config.export.num_prompts]
    if config.train.path is None:  # a checkpoint given by its path may be of other prompts than this configuration's
        prompts = {prompt.prompt_id: prompt for prompt in lineage.prompt_set(config).prompts}
        require_rendering(texts, prompts, load_tokenizer(target.path), config.prompts.date)
    return texts


def _tried(config: PipelineConfig, directory: Path, target: lineage.Target, texts: list[ScoredText]) -> Trial:
    """The draft in `directory`, as the server would run it."""
    here = machine(config.mesh, target.path, draft=directory)
    model, weights = read_target(config, target.path, here)
    sizes, draft_weights = read_draft(config, directory, here)
    return run_trial(
        weights,
        model,
        Draft(draft_weights, sizes),
        texts,
        stop_token_ids=stop_token_ids(load_tokenizer(target.path)),
        slots=config.serve.slots,
        prefill_chunk=config.serve.prefill_chunk,
        here=here,
    )


def _run_directory(trained: Artifact) -> Place:
    """Where the weights are, every byte of them as it was written."""
    found = {name.partition("/")[0] for name in trained.files if name.startswith("run-")}
    if len(found) != 1:
        raise PipelineError(f"{trained.path} holds {len(found)} run directories, wanted one; run stage=train again")
    run = found.pop()
    read = {name: entry for name, entry in trained.files.items() if holds_weights(name.removeprefix(f"{run}/"))}
    damaged = places.damage(trained.path, read, verify=True)
    if damaged:
        raise PipelineError(f"{trained.path} is damaged; {MEND}\n  " + "\n  ".join(damaged))
    return trained.path / run


def _training(config: PipelineConfig, contract: Contract, trained: Artifact) -> Training:
    is_on_hub = contract.target.revision is not None
    choice = f"target={config.target.name}" if config.target.path is None or is_on_hub else TARGET_CHOICE
    return Training(
        base_model=config.target.path if is_on_hub else None,
        choice=choice,
        settings=trained.settings,
        data=json.loads((trained.path / lineage.DATA).read_text()),
        fingerprint=trained.fingerprint,
    )


def _token_ids(target: Path) -> dict[str, int]:
    """The target's special tokens, under the keys that a draft's config.json has too."""
    config = checkpoints.read_config(target)
    found = {key: config.get(key) for key in TOKEN_IDS}
    first = {key: value[0] if isinstance(value, list) else value for key, value in found.items()}
    return {key: value for key, value in first.items() if value is not None}


def _trial_of(made: Artifact) -> Trial:
    evaluation = json.loads((made.path / lineage.EVALUATION).read_text())
    if "engine" not in evaluation:
        raise PipelineError(
            f"the draft at {made.path} was never tried in the engine: an earlier version made it; delete it and run "
            f"{lineage.command('export')}"
        )
    return Trial.from_json(evaluation["engine"])


def _report(tracker: Run, made: Artifact, verb: str) -> None:
    trial = _trial_of(made)
    trained, engine = trial.trained, trial.engine
    tracker.log_metrics({f"export/{name}": value for name, value in engine.metrics().items()})
    tracker.log_metrics(
        {
            "export/accept_length_training": trained.accept_length,
            "export/accept_length_engine": engine.accept_length,
            "export/accept_length_difference": trial.difference,
            "export/accept_length_greedy": trial.greedy.accept_length,
        }
    )
    tracker.log_json(artifacts.CONTRACT, Contract.from_json(made.contract).to_json())
    tracker.log_artifact(made.path / CARD)
    log.info(
        "export: accept_length %.3f before (training evaluation), %.3f after (exported draft in the engine), %+.2f%%: "
        "%d held-out texts, %d of them as the engine writes them",
        trained.accept_length,
        engine.accept_length,
        100 * trial.difference,
        trial.num_texts,
        trial.num_greedy,
    )
    if trial.num_greedy < trial.num_texts:
        log.info("export: accept_length %.3f on what the engine writes itself", trial.greedy.accept_length)
    log.info("export: the draft %s at %s", verb, made.path)
