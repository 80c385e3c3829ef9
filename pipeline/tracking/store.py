"""Connects to MLflow's store and turns its failures into one error."""

import contextlib
import logging
import os
import shlex
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError

log = logging.getLogger("pipeline")

DATABASE, ARTIFACTS = "mlflow.db", "mlartifacts"  # under the output directory, without a server
SERVER_TIMEOUT_SECONDS = 5

MLFLOW_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",  # seconds; the default is 120
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "5",  # about a minute; the default of 7 takes four
    "MLFLOW_DISABLE_TELEMETRY": "true",  # it would report usage to its developers
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # stdout is for results
}


class StoreLost(PipelineError):
    """Reports that the store no longer takes what is written."""


def ui_command(uri: str | None, output_dir: Path) -> str:
    """Returns the command to type (or the address to open) to see the runs."""
    if uri is not None and is_server(uri):
        return f"open {uri}"
    beside = Path(sys.executable).with_name("mlflow")
    program = "mlflow"
    if beside.is_file():
        program = str(beside.relative_to(Path.cwd()) if beside.is_relative_to(Path.cwd()) else beside)
    return shlex.join([program, "ui", "--backend-store-uri", uri or database_uri(output_dir)])


def connect(uri: str | None, experiment: str, output_dir: Path) -> tuple[Any, str, str]:
    """Returns an MLflow client, the experiment's id and the store's address; raises PipelineError without a store."""
    store = uri or database_uri(output_dir)
    if urllib.parse.urlsplit(store).password:
        raise PipelineError(
            "tracking.uri carries a password, which would be logged; take it out of the address and set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    if is_server(store):
        _require_server(store)
    else:
        _make_directory(output_dir)
    for name, value in MLFLOW_SETTINGS.items():  # MLflow reads them when it is imported
        os.environ.setdefault(name, value)
    import mlflow

    logging.getLogger("mlflow").setLevel(logging.WARNING)  # MLflow logs how it creates its tables
    logging.getLogger("alembic").setLevel(logging.WARNING)
    with store_errors(store):
        client = mlflow.MlflowClient(tracking_uri=store)
        found = client.get_experiment_by_name(experiment)
        if found is not None:
            return client, found.experiment_id, store
        location = None if is_server(store) else (output_dir.resolve() / ARTIFACTS).as_uri()
        return client, client.create_experiment(experiment, artifact_location=location), store


@contextlib.contextmanager
def store_errors(store: str) -> Iterator[None]:
    """Turns errors of MLflow and of the network into StoreLost."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StoreLost(f"MLflow at {store}: {reason}; when it is well again, run the same command to go on") from error


def _require_server(uri: str) -> None:
    """Raises PipelineError when nothing answers at `uri`; MLflow itself would retry for minutes."""
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=SERVER_TIMEOUT_SECONDS):
            pass
    except urllib.error.HTTPError:
        pass  # something answers (a proxy may hide the health page); the first call shows whether it is MLflow
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


def database_uri(output_dir: Path) -> str:
    """Returns the URI of the SQLite file under an output directory."""
    return f"sqlite:///{output_dir.resolve() / DATABASE}"


def is_server(uri: str) -> bool:
    """Returns whether a tracking URI is that of a server."""
    return uri.startswith(("http://", "https://"))
