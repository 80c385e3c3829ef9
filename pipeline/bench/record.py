"""Writes a benchmark: an artifact of its own with its record and its page, and its run in MLflow."""

import dataclasses
import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.artifacts import artifact, provenance
from pipeline.artifacts.artifact import Artifact, Parent
from pipeline.artifacts.contract import Contract
from pipeline.artifacts.files import disk_errors, write_json
from pipeline.bench import report
from pipeline.bench.losslessness import Losslessness
from pipeline.pages import bench_page, figures
from pipeline.prompts.sources import Prompt
from pipeline.tracking.run import Run
from pipeline.workspace.workspace import Workspace

log = logging.getLogger("pipeline")

RESULTS, PAGE = "results.json", "report.html"
BENCHMARK, VERSION = "benchmark", 3  # the kind of artifact, and of its settings
NAMED_PACKAGES = ("jax", "jaxlib", "transformers", "numpy")


def identity(workspace: Workspace, exported: Artifact) -> dict[str, Any]:
    """Returns what was measured, and with which settings: what two records must share to be compared."""
    config, versions = workspace.config, provenance.package_versions()
    return {
        "target": config.target.name,
        "target_fingerprint": workspace.target.fingerprint,
        "draft": str(exported.path),
        "draft_fingerprint": exported.fingerprint,
        "commit": provenance.git_commit(),
        "version": provenance.version(),
        "packages": {name: versions[name] for name in NAMED_PACKAGES if name in versions},
        "precision": config.target.precision.value,
        "temperature": config.bench.temperature,
        "slots": config.bench.slots,
    }


def write(
    workspace: Workspace,
    exported: Artifact,
    measured: Mapping[str, Any],
    lossless: Losslessness,
    *,
    config: Mapping[str, Any],
    prompts: Sequence[Prompt],
    weights: str,
    tracker: Run,
) -> Path:
    """Writes a measurement as an artifact, never reused: its path has the time and the run in it; logs it to MLflow.

    `config` is the whole configuration as JSON values; `prompts` are those that were decoded, and `weights` is
    the fingerprint of the training that made the draft, or of the draft itself.
    """
    draft, target = exported.kind, config["target"]
    contract = dataclasses.replace(
        Contract.from_json(exported.contract),
        target=workspace.target.contract.target,
        provenance=provenance.provenance("bench", config, {draft: exported.fingerprint}),
    )
    settings = {"bench": config["bench"], "precision": target["precision"]}
    key = artifact.key_of(BENCHMARK, VERSION, settings, {draft: exported.key or exported.fingerprint})
    started = time.strftime("%Y%m%d-%H%M%S")
    path = workspace.root / "bench" / target["name"] / f"{started}-{tracker.run_id[:8] or key}"
    block_size = exported.contract["draft"]["block_size"]
    with disk_errors(path):
        scratch = Path(str(artifact.open_scratch(path, resume=False)))
        differences = [dataclasses.asdict(one) for one in lossless.differences]
        write_json(scratch / RESULTS, {**measured, "differences": differences})
        (scratch / PAGE).write_text(bench_page.bench_page(measured, block_size), encoding="utf-8")
        artifact.seal(
            path,
            kind=BENCHMARK,
            key=key,
            settings=settings,
            parents={draft: Parent(key=exported.key or "", fingerprint=exported.fingerprint)},
            contract=contract.to_json(),
        )
    ids = [one.prompt_id for one in prompts]
    tracker.rename(f"bench, {Path(str(exported.path)).name}, {time.strftime('%d %b %H:%M')}")
    tracker.log_dataset(
        ", ".join(config["bench"]["prompt_sets"]) or "held-out prompts",
        measured["prompts_fingerprint"],
        source=_source_of(config),
        context="evaluation",
        profile={"prompts": len(ids), "tokens": measured["decode_tokens"]},
    )
    tracker.link_model("draft", weights, is_output=False, tags={"draft": str(exported.path)})
    tracker.log_metrics(report.metrics(measured))
    tracker.log_json(artifact.CONTRACT, contract.to_json())
    tracker.log_json(RESULTS, measured)
    tracker.log_artifact(path / PAGE)
    _log_figures(tracker, measured, block_size)
    log.info("bench: the record is %s, the page for people %s", path / RESULTS, path / PAGE)
    return path


def _source_of(config: Mapping[str, Any]) -> str:
    prompts, sets = config["prompts"], config["bench"]["prompt_sets"]
    return ", ".join(sets) or prompts["path"] or prompts["dataset"] or prompts["source"]


def _log_figures(tracker: Run, measured: Mapping[str, Any], block_size: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, (_, draw) in figures.figures_of(measured, block_size).items():
            for theme in figures.INK:
                file = Path(folder) / f"{name}_{theme}.png"
                file.write_bytes(figures.drawn(draw, theme, image="png"))
                tracker.log_artifact(file)
