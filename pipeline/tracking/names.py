"""Runs in MLflow, and the only import of it.

The import costs seconds, so it waits for the first run that is opened. Without a server, runs live in a SQLite
file under the output directory, and their artifacts beside it.
"""

import contextlib
import getpass
import logging
import math
import os
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.artifacts import PipelineError

log = logging.getLogger("pipeline")

DATABASE, ARTIFACTS = "mlflow.db", "mlartifacts"
SERVER_TIMEOUT_SECONDS = 5
KEY_CHARACTERS, VALUE_CHARACTERS, PARAMS_PER_BATCH = 250, 6000, 100  # the limits of MLflow's stores
TAG_CHARACTERS = 5000
MLFLOW_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",  # seconds, where it has 120
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "5",  # about a minute, where its 7 are four
    "MLFLOW_DISABLE_TELEMETRY": "true",  # it would report to its makers
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # stdout is for results
}
UNUSABLE = re.compile(r"[^0-9A-Za-z_\-. /]")  # in a metric's or parameter's name


class StoreLost(PipelineError):
    """The store took nothing more."""


class Run:
    """One run: everything that a stage may write about itself. Writing raises StoreLost when the store fails.

    What carries the value of HF_TOKEN is refused.
    """

    def __init__(self, client: Any, *, experiment_id: str, run_id: str, store: str) -> None:
        self.run_id = run_id
        self._client = client
        self._experiment_id = experiment_id
        self._store = store

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record values that decided the run; nested mappings become dotted keys, long values are cut."""
        from mlflow.entities import Param

        flat = _flattened(params)
        _refuse_token(flat)
        entries = [Param(_usable(key), str(value)[:VALUE_CHARACTERS]) for key, value in flat.items()]
        with _store_errors(self._store):
            for start in range(0, len(entries), PARAMS_PER_BATCH):
                self._client.log_batch(self.run_id, params=entries[start : start + PARAMS_PER_BATCH])

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record measured numbers at `step`. A value that is not finite is told in the log and stored as NaN.

        (MLflow would store an infinity as 1.8e308, which no chart shows beside the others.)
        """
        from mlflow.entities import Metric

        values = {name: float(value) for name, value in metrics.items()}
        names = {name: _usable(name) for name in values}
        if len(set(names.values())) < len(names):
            raise ValueError(f"metrics that MLflow cannot tell apart: {sorted(names)}")
        for name, value in values.items():
            if not math.isfinite(value):
                log.warning("%s is %s%s", name, value, "" if step is None else f" at step {step}")
                values[name] = math.nan
        now_ms = int(time.time() * 1000)
        entries = [Metric(names[name], value, now_ms, step or 0) for name, value in values.items()]
        with _store_errors(self._store):
            self._client.log_batch(self.run_id, metrics=entries)

    def log_artifact(self, path: Path) -> None:
        """Copy a file or a directory into the run."""
        with _store_errors(self._store):
            if path.is_dir():
                self._client.log_artifacts(self.run_id, str(path), artifact_path=path.name)
            else:
                self._client.log_artifact(self.run_id, str(path))

    def log_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Record a JSON value as the artifact `name` (YAML when the name ends in .yaml)."""
        _refuse_token(_flattened(value))
        with _store_errors(self._store):
            self._client.log_dict(self.run_id, dict(value), name)

    def set_tag(self, key: str, value: str) -> None:
        """Attach a word or two to the run."""
        _refuse_token({key: value})
        with _store_errors(self._store):
            self._client.set_tag(self.run_id, _usable(key), value[:TAG_CHARACTERS])

    @contextlib.contextmanager
    def child(self, name: str) -> Iterator["Run"]:
        """A run nested under this one, ended with the block."""
        run = _started(self._client, self._experiment_id, name, parent_run_id=self.run_id, store=self._store)
        with _ended(run):
            yield run

    def _end(self, status: str) -> None:
        with _store_errors(self._store):
            self._client.set_terminated(self.run_id, status=status)


class SilentRun(Run):
    """Takes what a `Run` takes and keeps nothing: of several hosts that run a stage, one keeps it."""

    def __init__(self) -> None:
        self.run_id = ""

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Nothing."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Nothing."""

    def log_artifact(self, path: Path) -> None:
        """Nothing."""

    def log_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Nothing."""

    def set_tag(self, key: str, value: str) -> None:
        """Nothing."""


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
    """A run for one stage, with its resolved config as parameters and as `config.yaml`.

    It ends FINISHED, FAILED (an exception, kept in the tag `error`) or KILLED (an interrupt). `uri` null: the
    SQLite file under `output_dir`. Raises PipelineError within seconds when the store cannot be reached.
    """
    _refuse_token(_flattened(config))
    client, experiment_id, store = _connected(uri, experiment, output_dir)
    run = _started(client, experiment_id, name, parent_run_id=parent_run_id, store=store, git_commit=git_commit)
    with _ended(run):
        run.log_json("config.yaml", config)
        run.log_params(config)
        yield run


def ui_command(uri: str | None, output_dir: Path) -> str:
    """What to type (or to open) to see the runs."""
    if uri is not None and _is_server(uri):
        return f"open {uri}"
    beside = Path(sys.executable).with_name("mlflow")
    program = "mlflow"
    if beside.is_file():
        program = str(beside.relative_to(Path.cwd()) if beside.is_relative_to(Path.cwd()) else beside)
    return f"{program} ui --backend-store-uri {uri or _database(output_dir)}"


def _connected(uri: str | None, experiment: str, output_dir: Path) -> tuple[Any, str, str]:
    """An MLflow client, the experiment's id and the store's address."""
    store = uri or _database(output_dir)
    if urllib.parse.urlsplit(store).password:
        raise PipelineError(
            "tracking.uri carries a password, which would be logged; take it out of the address and set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    if _is_server(store):
        _require_server(store)
    else:
        _make_directory(output_dir)
    for name, value in MLFLOW_SETTINGS.items():  # read when it is imported
        os.environ.setdefault(name, value)
    import mlflow

    logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells how it creates its tables
    logging.getLogger("alembic").setLevel(logging.WARNING)
    with _store_errors(store):
        client = mlflow.MlflowClient(tracking_uri=store)
        found = client.get_experiment_by_name(experiment)
        if found is not None:
            return client, found.experiment_id, store
        place = None if _is_server(store) else (output_dir.resolve() / ARTIFACTS).as_uri()
        return client, client.create_experiment(experiment, artifact_location=place), store


def _started(
    client: Any,
    experiment_id: str,
    name: str,
    *,
    parent_run_id: str | None,
    store: str,
    git_commit: str | None = None,
) -> Run:
    tags = {"mlflow.source.name": "pipeline", "mlflow.user": getpass.getuser()}
    if parent_run_id is not None:
        tags["mlflow.parentRunId"] = parent_run_id
    if git_commit is not None:
        tags["mlflow.source.git.commit"] = git_commit
    with _store_errors(store):
        started = client.create_run(experiment_id, run_name=name, tags=tags)
    return Run(client, experiment_id=experiment_id, run_id=started.info.run_id, store=store)


@contextlib.contextmanager
def _ended(run: Run) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        killed = isinstance(error, KeyboardInterrupt)
        try:
            if not isinstance(error, (KeyboardInterrupt, StoreLost)):
                run.set_tag("error", _without_token(f"{type(error).__name__}: {error}"))
            run._end("KILLED" if killed else "FAILED")
        except StoreLost as lost:  # the first error is the one to tell
            log.warning("the run stays open in MLflow: %s", lost)
        raise
    run._end("FINISHED")


@contextlib.contextmanager
def _store_errors(store: str) -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StoreLost(f"MLflow at {store}: {reason}; when it is well again, run the same command to go on") from error


def _require_server(uri: str) -> None:
    """Raise PipelineError when nothing answers at `uri`; MLflow itself would retry for minutes."""
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=SERVER_TIMEOUT_SECONDS):
            pass
    except urllib.error.HTTPError:
        pass  # something answers (a proxy may hide the health page); what it is shows at the first call
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise PipelineError(
            f"no MLflow server answers at {uri} ({reason}); start it, correct tracking.uri, or leave it out to "
            "track in a file under output_dir"
        ) from error


def _make_directory(output_dir: Path) -> None:
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PipelineError(f"output_dir is {output_dir}; it cannot be created ({error.strerror})") from error


def _database(output_dir: Path) -> str:
    return f"sqlite:///{output_dir.resolve() / DATABASE}"


def _is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def _usable(name: str) -> str:
    """The name with what MLflow does not take replaced by `_`."""
    return re.sub(r"/{2,}", "/", UNUSABLE.sub("_", name)).strip("/")[:KEY_CHARACTERS]


def _flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _refuse_token(values: Mapping[str, Any]) -> None:
    token = os.environ.get("HF_TOKEN")
    carrying = [key for key, value in values.items() if token and (token in str(value) or token in key)]
    if carrying:
        names = ", ".join(_without_token(key) for key in carrying)
        raise PipelineError(f"the value of HF_TOKEN is in {names}; it is never logged: take it out")


def _without_token(text: str) -> str:
    token = os.environ.get("HF_TOKEN")
    return text.replace(token, "HF_TOKEN") if token else text
