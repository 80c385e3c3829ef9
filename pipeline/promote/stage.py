"""`stage=promote`: registers an exported draft, and makes it the champion if it is better beyond doubt."""

import json
import logging
from pathlib import Path
from typing import Any

from pipeline.bench.record import RESULTS
from pipeline.config.fields import DRAFT
from pipeline.config.schema import PipelineConfig
from pipeline.errors import PipelineError
from pipeline.promote import judgement
from pipeline.tracking.registry import CHAMPION, PREVIOUS, Registry
from pipeline.tracking.run import Run
from pipeline.workspace.workspace import Workspace

log = logging.getLogger("pipeline")


def run(config: PipelineConfig, tracker: Run) -> None:
    """Moves the alias `champion`. Raises PipelineError with every reason when the draft may not have it."""
    wanted = config.promote
    name = wanted.model or f"{config.target.name}-dflash"
    registry = Registry(name, uri=config.tracking.uri, output_dir=Path(config.output_dir))
    claimant = f"run {tracker.run_id[:8] or 'without tracking'}"
    if wanted.rollback:
        _roll_back(registry, claimant)
        return
    workspace = Workspace(config)
    exported = workspace.open(DRAFT)
    record = judgement.carried(_newest_record(Path(config.output_dir), exported.fingerprint))
    with registry.claimed(claimant):
        version = registry.register(
            Path(str(exported.path)), exported.fingerprint, run_id=tracker.run_id or None, record=record
        )
        log.info("promote: %s is version %s of %s", exported.path, version.number, name)
        champion = registry.of_alias(CHAMPION)
        if champion is not None and champion.fingerprint == exported.fingerprint:
            log.info("promote: version %s is the champion already", version.number)
            return
        reasons = judgement.reasons_against(record, None if champion is None else champion.record, wanted.tolerance)
        if reasons:
            listed = "\n  ".join(reasons)
            present = "there is none" if champion is None else f"version {champion.number} stays it"
            raise PipelineError(
                f"version {version.number} of {name} does not become the champion ({present}):\n  {listed}"
            )
        if champion is not None:
            registry.move(PREVIOUS, champion.number)
        registry.move(CHAMPION, version.number)
    tracker.set_tag("champion", f"{name} version {version.number}")
    log.info("promote: version %s of %s is the champion: models:/%s@%s", version.number, name, name, CHAMPION)


def _roll_back(registry: Registry, claimant: str) -> None:
    """Makes the champion before this one the champion again, and this one the one before."""
    with registry.claimed(claimant):
        now, before = registry.of_alias(CHAMPION), registry.of_alias(PREVIOUS)
        if now is None or before is None:
            raise PipelineError(
                f"{registry.name} has had no champion before the present one; there is nothing to go back to"
            )
        registry.move(CHAMPION, before.number)
        registry.move(PREVIOUS, now.number)
    log.info("promote: version %s of %s is the champion again", before.number, registry.name)


def _newest_record(root: Path, fingerprint: str) -> dict[str, Any]:
    """Returns the newest benchmark of a draft; raises PipelineError where it has none."""
    files = sorted((root / "bench").glob(f"*/*/{RESULTS}"), key=lambda file: file.parent.name)
    for file in reversed(files):
        record = json.loads(file.read_text(encoding="utf-8"))
        if record.get("draft_fingerprint") == fingerprint:
            return dict(record)
    raise PipelineError("the draft has no benchmark under output_dir; run: python -m pipeline stage=bench")
