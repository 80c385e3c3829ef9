"""`stage=export`: writes the trained draft as an HF directory, which appears only after a check in the engine."""

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.artifacts import artifact, storage
from pipeline.artifacts.artifact import Artifact
from pipeline.artifacts.contract import Contract
from pipeline.artifacts.files import disk_errors, write_bytes, write_json
from pipeline.artifacts.storage import StoragePath
from pipeline.config.fields import CHECKPOINT, DRAFT, TARGET, TEACHER_CACHE
from pipeline.config.schema import PipelineConfig
from pipeline.errors import PipelineError
from pipeline.export.card import TrainingRecord, model_card
from pipeline.export.easydel_checkpoint import TRAIN_AGAIN, holds_weights, read_checkpoint
from pipeline.export.engine_check import EngineCheck, require_agreement, run_engine_check
from pipeline.export.prompt_rendering import require_rendering
from pipeline.export.write import write_draft
from pipeline.model.dflash.model import DraftModel
from pipeline.model.hf.directory import read_config
from pipeline.store import heldout_rounds
from pipeline.store.checkpoint_files import DATA, EVALUATION
from pipeline.store.heldout_rounds import HeldoutText
from pipeline.tracking.run import Run
from pipeline.workspace.loading import load_draft, load_target, runtime_for
from pipeline.workspace.workspace import Workspace, command, own_draft_config

log = logging.getLogger("pipeline")

CARD_FILE = "README.md"
TARGET_CHOICE = "target=local target.path=<the target's directory>"
GGUF_CHOICE = "target=local target.gguf=<the target's file>"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def run(config: PipelineConfig, tracker: Run) -> None:
    """Exports the trained draft of this configuration, or reports that it exists."""
    workspace = Workspace(config)
    path = Path(str(workspace.address(DRAFT)))
    if not artifact.exists(path):
        with disk_errors(path), artifact.exclusive(path), _nothing_left(path):
            if not artifact.exists(path):
                _report(tracker, _export(workspace, path, tracker), "is made")
                return
    exported = workspace.open(DRAFT)
    _report(tracker, exported, "stands")
    require_agreement(_engine_check_of(exported), config.export.tolerance)  # the tolerance may have changed since


def _export(workspace: Workspace, path: Path, tracker: Run) -> Artifact:
    trained = workspace.open(CHECKPOINT)
    draft_config = own_draft_config(trained)
    evaluation = json.loads((trained.path / EVALUATION).read_text())
    texts = _texts(workspace, trained)
    draft = DraftModel(draft_config, read_checkpoint(_run_directory(trained), draft_config))
    target = workspace.target
    provenance = workspace.provenance(DRAFT, {TARGET: target.fingerprint, CHECKPOINT: trained.fingerprint})
    contract = workspace.contract(DRAFT, provenance)
    scratch = artifact.open_scratch(path, resume=False)  # an export takes seconds: it begins anew after an interrupt
    parity = write_draft(scratch, draft, _token_ids(target.path))
    checked = _check(workspace, scratch, texts)
    require_agreement(checked, workspace.config.export.tolerance)
    evaluation["engine"] = checked.to_json()
    write_json(scratch / EVALUATION, evaluation)
    record = _record(workspace, contract, trained)
    write_bytes(scratch / CARD_FILE, model_card(draft_config, contract, evaluation, record).encode())
    exported = workspace.seal(DRAFT, contract, {CHECKPOINT: trained})
    tracker.log_metrics(
        {"export/max_difference": parity.max_difference, "export/relative_error": parity.relative_error}
    )
    log.info(
        "export: weights equal the trained ones rounded to bfloat16; outputs differ by %.1e (relative RMS)",
        parity.relative_error,
    )
    return exported


@contextlib.contextmanager
def _nothing_left(path: Path) -> Iterator[None]:
    """Removes the scratch directory of a draft that is refused, so that nobody serves it by hand."""
    try:
        yield
    except PipelineError:
        shutil.rmtree(artifact.local_scratch_of(path), ignore_errors=True)
        raise


def _texts(workspace: Workspace, trained: Artifact) -> list[HeldoutText]:
    """Returns the first held-out texts of the training evaluation; their prompts must be as serving renders them."""
    config = workspace.config
    texts = heldout_rounds.read_texts(trained.path / heldout_rounds.FILE)[: config.export.num_prompts]
    if config.train.path is None:  # a checkpoint at train.path may have other prompts than this configuration's
        prompts = {prompt.prompt_id: prompt for prompt in workspace.prompts.prompts}
        require_rendering(texts, prompts, workspace.tokenizer, config.prompts.date)
    return texts


def _check(workspace: Workspace, directory: Path, texts: list[HeldoutText]) -> EngineCheck:
    """Runs the draft in `directory` as the server would run it."""
    config, target = workspace.config, workspace.target
    runtime = runtime_for(config.mesh, target.path, draft=directory)
    return run_engine_check(
        load_target(config.target, target.path, runtime),
        load_draft(config.target.precision, directory, runtime),
        texts,
        workspace.serving_engine,
        runtime,
    )


def _run_directory(trained: Artifact) -> StoragePath:
    """Returns where the weights are; raises PipelineError when a byte of them is not as it was written."""
    found = {name.partition("/")[0] for name in trained.files if name.startswith("run-")}
    if len(found) != 1:
        raise PipelineError(f"{trained.path} holds {len(found)} run directories, wanted one; run stage=train again")
    run = found.pop()
    read = {name: entry for name, entry in trained.files.items() if holds_weights(name.removeprefix(f"{run}/"))}
    damaged = storage.damaged_files(trained.path, read, verify=True)
    if damaged:
        raise PipelineError(f"{trained.path} is damaged; {TRAIN_AGAIN}\n  " + "\n  ".join(damaged))
    return trained.path / run


def _record(workspace: Workspace, contract: Contract, trained: Artifact) -> TrainingRecord:
    target = workspace.config.target
    is_on_hub = contract.target.revision is not None
    cache = trained.parents[TEACHER_CACHE].fingerprint if trained.parents else trained.settings["teacher_cache"]
    choice = f"target={target.name}" if target.path is None or is_on_hub else TARGET_CHOICE
    is_converted = target.gguf is not None and target.pretrained is None
    return TrainingRecord(
        base_model=target.path if is_on_hub else None,
        choice=GGUF_CHOICE if is_converted else choice,
        recipe={
            name.removeprefix("train."): value for name, value in trained.settings.items() if name.startswith("train.")
        },
        data=json.loads((trained.path / DATA).read_text()),
        teacher_cache=cache,
        fingerprint=trained.fingerprint,
    )


def _token_ids(target: Path) -> dict[str, int]:
    """Returns the target's special tokens, under the keys that a draft's config.json has too."""
    config = read_config(target)
    found = {key: config.get(key) for key in TOKEN_IDS}
    first: dict[str, Any] = {key: value[0] if isinstance(value, list) else value for key, value in found.items()}
    return {key: value for key, value in first.items() if value is not None}


def _engine_check_of(exported: Artifact) -> EngineCheck:
    evaluation = json.loads((exported.path / EVALUATION).read_text())
    if "engine" not in evaluation:
        raise PipelineError(
            f"the draft at {exported.path} was never run in the engine: an earlier version made it; delete it and run "
            f"{command('export')}"
        )
    return EngineCheck.from_json(evaluation["engine"])


def _report(tracker: Run, exported: Artifact, verb: str) -> None:
    check = _engine_check_of(exported)
    trained, engine = check.trained, check.engine
    fingerprint = exported.parents[CHECKPOINT].fingerprint
    tracker.link_model("draft", fingerprint, is_output=False, tags={"draft": str(exported.path)})
    tracker.log_metrics({f"export/{name}": value for name, value in engine.metrics().items()})
    tracker.log_metrics(
        {
            "export/accept_length_training": trained.accept_length,
            "export/accept_length_engine": engine.accept_length,
            "export/accept_length_difference": check.difference,
            "export/accept_length_greedy": check.greedy.accept_length,
        }
    )
    tracker.log_json(artifact.CONTRACT, Contract.from_json(exported.contract).to_json())
    tracker.log_artifact(Path(str(exported.path)) / CARD_FILE)
    log.info(
        "export: accept_length %.3f before (training evaluation), %.3f after (exported draft in the engine), %+.2f%%: "
        "%d held-out texts, %d of them as the engine writes them",
        trained.accept_length,
        engine.accept_length,
        100 * check.difference,
        check.num_texts,
        check.num_greedy,
    )
    if check.num_greedy < check.num_texts:
        log.info("export: accept_length %.3f on what the engine writes itself", check.greedy.accept_length)
    log.info("export: the draft %s at %s", verb, exported.path)
