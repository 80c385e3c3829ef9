"""Writes one MLflow run: parameters, metrics, artifacts, tags, data sets and models of a stage.

MLflow is imported when the first run is opened, because the import takes seconds.
"""

import contextlib
import dataclasses
import getpass
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.artifacts.hashing import flatten
from pipeline.tracking import models, outbox
from pipeline.tracking.names import (
    DIGEST_CHARACTERS,
    PARAMS_PER_BATCH,
    TAG_CHARACTERS,
    VALUE_CHARACTERS,
    refuse_token,
    usable_name,
    without_token,
)
from pipeline.tracking.outbox import Outbox
from pipeline.tracking.store import StoreLost, connect, store_errors

log = logging.getLogger("pipeline")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunInfo:
    """Says what a run is: the name that tells it from others, what decided it, and where it belongs.

    `params` are what runs are compared by; `config` is everything, which becomes `config.yaml`.
    """

    name: str
    config: Mapping[str, Any]
    params: Mapping[str, Any]
    tags: Mapping[str, str] = dataclasses.field(default_factory=dict)
    parent_run_id: str | None = None


class Run:
    """Writes to one run.

    While a server is away, what is written waits; any other store that fails raises StoreLost. Names and values that
    contain the value of HF_TOKEN are refused with a PipelineError.
    """

    def __init__(self, client: Any, *, run_id: str, experiment_id: str, store: str, output_dir: Path) -> None:
        self.run_id = run_id
        self._client, self.experiment_id, self._store = client, experiment_id, store
        self._outbox = Outbox(client, run_id, store, output_dir)
        self._model_id: str | None = None

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Records values that decided the run; nested mappings become dotted keys, long values are shortened."""
        flat = flatten(params)
        refuse_token(flat)
        entries = [(usable_name(key), str(value)[:VALUE_CHARACTERS]) for key, value in flat.items()]
        for start in range(0, len(entries), PARAMS_PER_BATCH):
            self._outbox.send({"kind": "params", "params": dict(entries[start : start + PARAMS_PER_BATCH])})

    def log_metrics(self, metrics: Mapping[str, float | int], step: int | None = None) -> None:
        """Records measured numbers at `step`; a value that is not finite is logged as a warning and stored as NaN.

        MLflow would store an infinity as 1.8e308, which makes charts unreadable. Behind `link_model`, they are numbers
        of that model too.
        """
        values = {name: float(value) for name, value in metrics.items()}
        names = {name: usable_name(name) for name in values}
        if len(set(names.values())) < len(names):
            raise ValueError(f"metrics that MLflow cannot tell apart: {sorted(names)}")
        for name, value in values.items():
            if not math.isfinite(value):
                log.warning("%s is %s%s", name, value, "" if step is None else f" at step {step}")
                values[name] = math.nan
        common = {"timestamp": int(time.time() * 1000), "step": step or 0, "model_id": self._model_id}
        entries = [{"key": names[name], "value": value, **common} for name, value in values.items()]
        self._outbox.send({"kind": "metrics", "metrics": entries})

    def log_artifact(self, path: Path) -> None:
        """Copies a file or a directory into the run."""
        self._outbox.send({"kind": "file", "path": str(path)})

    def log_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Records a JSON value as the artifact `name` (YAML when the name ends in .yaml)."""
        refuse_token(flatten(value))
        self._outbox.send({"kind": "json", "name": name, "value": dict(value)})

    def set_tag(self, key: str, value: str) -> None:
        """Attaches a short text to the run."""
        refuse_token({key: value})
        self._outbox.send({"kind": "tags", "tags": {usable_name(key): value[:TAG_CHARACTERS]}})

    def rename(self, name: str) -> None:
        """Gives the run another name, when more is known of what it is about."""
        self.set_tag("mlflow.runName", name)

    def log_dataset(self, name: str, digest: str, *, source: str, context: str, profile: Mapping[str, Any]) -> None:
        """Records which data the run read: `context` is what for, `digest` tells them from others of the name.

        `profile` are counts of what they hold.
        """
        refuse_token({"name": name, "source": source})
        values = {
            "name": name,
            "digest": digest[:DIGEST_CHARACTERS],
            "source_type": "local",
            "source": models.as_json({"uri": source}),
            "profile": models.as_json(profile),
        }
        self._outbox.send({"kind": "dataset", "dataset": values, "context": context})

    def link_model(self, name: str, fingerprint: str, *, is_output: bool, tags: Mapping[str, str]) -> None:
        """Links the run to the model of a fingerprint, which all runs about it share; metrics from here on are its too.

        While the server is away the run stays without a model.
        """
        refuse_token(dict(tags))
        try:
            with store_errors(self._store):
                self._model_id = models.find_or_create(
                    self._client, self.experiment_id, name, fingerprint, run_id=self.run_id, tags=tags
                )
        except StoreLost as lost:
            if not outbox.is_away(self._store, lost):
                raise
            log.warning("the run has no model in MLflow: %s", lost)
            return
        self._outbox.send({"kind": "model", "model_id": self._model_id, "is_output": is_output})

    def _end(self, status: str) -> None:
        self._outbox.close({"kind": "end", "status": status})


class SilentRun(Run):
    """Takes what a `Run` takes and writes nothing: of several hosts one writes, and tracking may be off."""

    def __init__(self) -> None:
        self.run_id = self.experiment_id = ""

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

    def log_dataset(self, name: str, digest: str, *, source: str, context: str, profile: Mapping[str, Any]) -> None:
        """Does nothing."""

    def link_model(self, name: str, fingerprint: str, *, is_output: bool, tags: Mapping[str, str]) -> None:
        """Does nothing."""


@contextlib.contextmanager
def open_run(info: RunInfo, *, uri: str | None, experiment: str, output_dir: Path) -> Iterator[Run]:
    """Opens a run for one stage.

    It ends FINISHED, FAILED (an exception, stored in the tag `error`) or KILLED (an interrupt). With `uri` None it is
    stored in a SQLite file under `output_dir`. Raises PipelineError within seconds when the store cannot be reached.
    """
    refuse_token(flatten(info.config))
    client, experiment_id, store = connect(uri, experiment, output_dir)
    outbox.send_unsent(client, store, output_dir)
    with store_errors(store):
        started = client.create_run(experiment_id, run_name=info.name, tags=_tags(info))
    run = Run(client, run_id=started.info.run_id, experiment_id=experiment_id, store=store, output_dir=output_dir)
    with _ended(run), _system_metrics(run.run_id, store):
        run.log_json("config.yaml", info.config)
        run.log_params(info.params)
        yield run


def _tags(info: RunInfo) -> dict[str, str]:
    tags = {"mlflow.source.name": "pipeline", "mlflow.user": _user(), **info.tags}
    return tags if info.parent_run_id is None else {**tags, "mlflow.parentRunId": info.parent_run_id}


def _user() -> str:
    """Returns the user's name, or the numeric user id without a passwd entry, as in many containers."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # KeyError: before Python 3.13
        return str(os.getuid())


@contextlib.contextmanager
def _system_metrics(run_id: str, store: str) -> Iterator[None]:
    """Records processor, memory, disk, network and GPUs while the run lasts, every ten seconds."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)  # it warns of every write to a server that fails
    monitor = SystemMetricsMonitor(run_id, tracking_uri=store)
    monitor.start()
    try:
        yield
    finally:
        with contextlib.suppress(Exception):  # what it measured is worth no run
            monitor.finish()


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
