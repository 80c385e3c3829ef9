"""Finds the records of benchmarks: files, directories, patterns, MLflow runs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.bench.record import RESULTS
from pipeline.bench.report import RECORD_FORMAT
from pipeline.errors import PipelineError
from pipeline.tracking import reading

RUN = "runs:/"


def read_records(
    wanted: Sequence[str], root: Path, *, uri: str | None, target: str | None = None
) -> dict[str, dict[str, Any]]:
    """Returns records by label, in the order of `wanted`, or of their making where nothing is: all under `root`.

    An entry is a results.json, the directory of a benchmark or of several, a pattern of those, or `runs:/<id>` of
    MLflow's store. Raises PipelineError for what is none, and for records of earlier versions, which have no intervals.
    """
    found: dict[str, dict[str, Any]] = {}
    for entry in wanted or [str(root / "bench" / (target or "*"))]:
        if entry.startswith(RUN):
            run_id = entry.removeprefix(RUN)
            found[f"run {run_id[:8]}"] = _checked(reading.run_json(run_id, RESULTS, uri=uri, output_dir=root), entry)
            continue
        for file in _files(entry):
            record = json.loads(file.read_text(encoding="utf-8"))
            if not wanted and record.get("record_format", 0) < RECORD_FORMAT:
                continue  # an earlier version's, which nobody named
            found[_label(file, record, found)] = _checked(record, str(file))
    if not found:
        raise PipelineError(
            f"there is no record of a benchmark in {', '.join(wanted) or root / 'bench'}; run stage=bench, or name "
            "records in report.records"
        )
    return found


def _files(entry: str) -> list[Path]:
    anchor = Path(Path(entry).anchor or ".")
    paths = [Path(entry)] if Path(entry).exists() else sorted(anchor.glob(entry.removeprefix(Path(entry).anchor)))
    if not paths and any(sign in entry for sign in "*?["):
        return []
    if not paths:
        raise PipelineError(f"report.records has {entry}, which does not exist")
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob(RESULTS)))]
    if not files:
        raise PipelineError(f"report.records has {entry}, which holds no {RESULTS}")
    return files


def _label(file: Path, record: dict[str, Any], others: dict[str, Any]) -> str:
    """Returns the draft's name, with the benchmark's where several are of one draft."""
    draft = Path(record.get("draft", file.parent.name)).name
    return draft if draft not in others else f"{draft}, {file.parent.name}"


def _checked(record: dict[str, Any], origin: str) -> dict[str, Any]:
    if record.get("record_format", 0) < RECORD_FORMAT:
        raise PipelineError(f"{origin} is of an earlier version, without intervals; run stage=bench again")
    return record
