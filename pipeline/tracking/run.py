"""Writes one MLflow run: parameters, metrics, artifacts and tags of a stage.

MLflow is imported when the first run is opened, because the import takes seconds.
"""

import contextlib
import getpass
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.artifacts.hashing import flatten
from pipeline.tracking.names import (
    PARAMS_PER_BATCH,
    TAG_CHARACTERS,
    VALUE_CHARACTERS,
    refuse_token,
    usable_name,
    without_token,
)
from pipeline.tracking.store import StoreLost, connect, store_errors

log = logging.getLogger("pipeline")


class Run:
    """Writes to one run. Writing raises StoreLost when the store fails.

    Names and values that contain the value of HF_TOKEN are refused with a PipelineError.
    """

    def __init__(self, client: Any, *, run_id: str, store: str) -> None:
        self.run_id = run_id
        self._client = client
        self._store = store

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Records values that decided the run; nested mappings become dotted keys, long values are shortened."""
        from mlflow.entities import Param

        flat = flatten(params)
        refuse_token(flat)
        entries = [Param(usable_name(key), str(value)[:VALUE_CHARACTERS]) for key, value in flat.items()]
        with store_errors(self._store):
            for start in range(0, len(entries), PARAMS_PER_BATCH):
                self._client.log_batch(self.run_id, params=entries[start : start + PARAMS_PER_BATCH])

    def log_metrics(self, metrics: Mapping[str, float | int], step: int | None = None) -> None:
        """Records measured numbers at `step`; a value that is not finite is logged as a warning and stored as NaN.

        MLflow would store an infinity as 1.8e308, which makes charts unreadable.
        """
        from mlflow.entities import Metric

        values = {name: float(value) for name, value in metrics.items()}
        names = {name: usable_name(name) for name in values}
        if len(set(names.values())) < len(names):
            raise ValueError(f"metrics that MLflow cannot tell apart: {sorted(names)}")
        for name, value in values.items():
            if not math.isfinite(value):
                log.warning("%s is %s%s", name, value, "" if step is None else f" at step {step}")
                values[name] = math.nan
        now_ms = int(time.time() * 1000)
        entries = [Metric(names[name], value, now_ms, step or 0) for name, value in values.items()]
        with store_errors(self._store):
            self._client.log_batch(self.run_id, metrics=entries)

    def log_artifact(self, path: Path) -> None:
        """Copies a file or a directory into the run."""
        with store_errors(self._store):
            if path.is_dir():
                self._client.log_artifacts(self.run_id, str(path), artifact_path=path.name)
            else:
                self._client.log_artifact(self.run_id, str(path))

    def log_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Records a JSON value as the artifact `name` (YAML when the name ends in .yaml)."""
        refuse_token(flatten(value))
        with store_errors(self._store):
            self._client.log_dict(self.run_id, dict(value), name)

    def set_tag(self, key: str, value: str) -> None:
        """Attaches a short text to the run."""
        refuse_token({key: value})
        with store_errors(self._store):
            self._client.set_tag(self.run_id, usable_name(key), value[:TAG_CHARACTERS])

    def _end(self, status: str) -> None:
        with store_errors(self._store):
            self._client.set_terminated(self.run_id, status=status)


class SilentRun(Run):
    """Takes what a `Run` takes and writes nothing: of several hosts that run a stage, one writes."""

    def __init__(self) -> None:
        self.run_id = ""

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Does nothing."""

    def log_metrics(self, metrics: Mapping[str, float | int], step: int | None = None) -> None:
        """Does nothing."""

    def log_artifact(self, path: Path) -> None:
        """Does nothing."""

    def log_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Does nothing."""

    def set_tag(self, key: str, value: str) -> None:
        """Does nothing."""


@contextlib.contextmanager
def open_run(
    name: str,
    *,
    uri: str | None,
    experiment: str,
    output_dir: Path,
    config: Mapping[str, Any],
    parent_run_id: str | None = None,
    git_commit: str | None = None,
) -> Iterator[Run]:
    """Opens a run for one stage, with its resolved config as parameters and as `config.yaml`.

    It ends FINISHED, FAILED (an exception, stored in the tag `error`) or KILLED (an interrupt). With `uri` None it is
    stored in a SQLite file under `output_dir`. Raises PipelineError within seconds when the store cannot be reached.
    """
    refuse_token(flatten(config))
    client, experiment_id, store = connect(uri, experiment, output_dir)
    run = _started(client, experiment_id, name, parent_run_id=parent_run_id, store=store, git_commit=git_commit)
    with _ended(run):
        run.log_json("config.yaml", config)
        run.log_params(config)
        yield run


def _started(
    client: Any,
    experiment_id: str,
    name: str,
    *,
    parent_run_id: str | None,
    store: str,
    git_commit: str | None = None,
) -> Run:
    tags = {"mlflow.source.name": "pipeline", "mlflow.user": _user()}
    if parent_run_id is not None:
        tags["mlflow.parentRunId"] = parent_run_id
    if git_commit is not None:
        tags["mlflow.source.git.commit"] = git_commit
    with store_errors(store):
        started = client.create_run(experiment_id, run_name=name, tags=tags)
    return Run(client, run_id=started.info.run_id, store=store)


def _user() -> str:
    """Returns the user's name, or the numeric user id without a passwd entry, as in many containers."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # KeyError: before Python 3.13
        return str(os.getuid())


@contextlib.contextmanager
def _ended(run: Run) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        killed = isinstance(error, KeyboardInterrupt)
        try:
            if not isinstance(error, (KeyboardInterrupt, StoreLost)):
                run.set_tag("error", without_token(f"{type(error).__name__}: {error}"))
            run._end("KILLED" if killed else "FAILED")
        except StoreLost as lost:  # the first error is the one to report
            log.warning("the run stays open in MLflow: %s", lost)
        raise
    run._end("FINISHED")
