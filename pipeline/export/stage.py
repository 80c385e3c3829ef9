"""`stage=export`: EasyDeL's run directory -> the draft as an HF directory, proved before it appears."""

import json
import logging
from pathlib import Path

from pipeline import artifacts, lineage, places
from pipeline.artifacts import Artifact, PipelineError
from pipeline.config import PipelineConfig
from pipeline.dflash.acceptance import Acceptance
from pipeline.dflash.contract import Contract
from pipeline.export.card import Training, model_card
from pipeline.export.run_directory import MEND, holds_weights, read_checkpoint
from pipeline.export.write import write_draft
from pipeline.model import checkpoints, hf_draft
from pipeline.places import Place
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
        _report(tracker, lineage.exported_draft(config, target), "stands")
        return
    trained = lineage.checkpoint(config, target)
    draft = hf_draft.config_from_hf(json.loads((trained.path / lineage.DRAFT_CONFIG).read_text()))
    evaluation = json.loads((trained.path / lineage.EVALUATION).read_text())
    weights = read_checkpoint(_run_directory(trained), draft)
    settings = lineage.export_settings(trained.fingerprint)
    parents = {"target": target.fingerprint, "checkpoint": trained.fingerprint}
    provenance = artifacts.provenance("export", settings, parents)
    contract = lineage.draft_contract(config, target, provenance)
    with artifacts.disk_errors(path):
        scratch = artifacts.open_scratch(path, resume=False)  # made in seconds: begun anew when interrupted
        parity = write_draft(scratch, draft, weights, _token_ids(target.path))
        artifacts.write_json(scratch / lineage.EVALUATION, evaluation)
        artifacts.write_bytes(
            scratch / CARD, model_card(draft, contract, evaluation, _training(config, contract, trained)).encode()
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


def _report(tracker: Run, made: Artifact, verb: str) -> None:
    evaluation = json.loads((made.path / lineage.EVALUATION).read_text())
    heldout = Acceptance(tuple(evaluation["heldout"]["histogram"]))
    tracker.log_metrics({f"export/{name}": value for name, value in heldout.metrics().items()})
    tracker.log_json(artifacts.CONTRACT, Contract.from_json(made.contract).to_json())
    tracker.log_artifact(made.path / CARD)
    log.info("export: the draft %s at %s", verb, made.path)
