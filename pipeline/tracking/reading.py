"""Reads what earlier runs wrote to MLflow's store."""

import json
import tempfile
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.tracking.store import DATABASE, StoreLost, client_of, store_errors


def last_seconds(stage: str, target: str, *, uri: str | None, output_dir: Path) -> float | None:
    """Returns the longest of the newest runs of a stage for a target, which made something; None without one."""
    if uri is None and not (output_dir / DATABASE).is_file():
        return None
    client, store = client_of(uri, output_dir)
    with store_errors(store):
        experiments = [one.experiment_id for one in client.search_experiments()]
        found = client.search_runs(
            experiments,
            filter_string=f"tags.stage = '{stage}' and tags.target = '{target}' and attributes.status = 'FINISHED'",
            order_by=["attributes.start_time DESC"],
            max_results=20,
        )
    seconds = [(one.info.end_time - one.info.start_time) / 1000 for one in found]
    return max(seconds, default=None)  # the others found what they were to make


def run_json(run_id: str, name: str, *, uri: str | None, output_dir: Path) -> dict[str, Any]:
    """Returns the JSON artifact of a run; raises PipelineError where the run or the artifact is missing."""
    client, store = client_of(uri, output_dir)
    try:
        with store_errors(store), tempfile.TemporaryDirectory() as folder:
            return json.loads(Path(client.download_artifacts(run_id, name, folder)).read_text(encoding="utf-8"))
    except StoreLost as error:
        raise PipelineError(f"the run {run_id} has no {name} ({error})") from error
