"""Connects to MLflow's store and turns its failures into one error."""

import contextlib
import logging
import os
import re
import shlex
import sqlite3
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.tracking import experiment_page

log = logging.getLogger("pipeline")

OWN_ARTIFACTS = re.compile(r"file://.*/mlartifacts(?=/|$)")
MOVED_COLUMNS = (  # of MLflow's tables
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
)
DATABASE, ARTIFACTS = "mlflow.db", "mlartifacts"  # under the output directory, without a server
SERVER_TIMEOUT_SECONDS = 5
LOCK_SECONDS = 60  # that a command waits for another one's write to the file

MLFLOW_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",  # seconds; the default is 120
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # some seconds, for what is written waits; the default of 7 takes minutes
    "MLFLOW_DISABLE_TELEMETRY": "true",  # it would report usage to its developers
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # stdout is for results
}


DATABASE_LOCKS = {  # held by a connection, and given back when it breaks
    "postgresql": ("SELECT pg_advisory_lock(4711)", "SELECT pg_advisory_unlock(4711)"),
    "mysql": ("SELECT GET_LOCK('pipeline', 120)", "SELECT RELEASE_LOCK('pipeline')"),
}
ASKED_WRONGLY = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # error codes of a store that is well
SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "file")
UNQUOTABLE = "?#%"  # in the path of a SQLite file's address


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
    client, store = client_of(uri, output_dir)
    with store_errors(store):
        location = None if is_server(store) else (output_dir.resolve() / ARTIFACTS).as_uri()
        return client, _experiment_id(client, experiment, location), store


def client_of(uri: str | None, output_dir: Path) -> tuple[Any, str]:
    """Returns an MLflow client and the store's address; raises PipelineError without a store."""
    store = uri or f"{database_uri(output_dir)}?timeout={LOCK_SECONDS}"
    if urllib.parse.urlsplit(store).password:
        raise PipelineError(
            "tracking.uri carries a password, which would be logged; take it out of the address and set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    _require_address(uri, output_dir)
    if is_server(store):
        _require_server(store)
    else:
        _make_directory(output_dir)
    for name, value in MLFLOW_SETTINGS.items():  # MLflow reads them when it is imported
        os.environ.setdefault(name, value)
    import mlflow

    require_driver(store)
    logging.getLogger("mlflow").setLevel(logging.WARNING)  # MLflow logs how it creates its tables
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it logs pages of what `store_errors` says
    with store_errors(store):
        if uri is None:
            _create_database(output_dir.resolve())
            follow_move(output_dir.resolve())
        with first_use(store):
            return mlflow.MlflowClient(tracking_uri=store, registry_uri=store), store


def _create_database(output_dir: Path) -> None:
    """Makes the SQLite file with all of MLflow's tables, so that it is whole or absent.

    MLflow would make it table by table: a command that is stopped meanwhile, or beside another one, leaves a file that
    no later command can open.
    """
    final = output_dir / DATABASE
    if final.exists():
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".mlflow-") as folder:
        scratch = Path(folder) / DATABASE
        store = SqlAlchemyStore(f"sqlite:///{scratch}", (output_dir / ARTIFACTS).as_uri())
        store.engine.dispose()
        with contextlib.suppress(FileExistsError):  # another command was faster, and its file is as good
            os.link(scratch, final)


@contextlib.contextmanager
def first_use(store: str) -> Iterator[None]:
    """Lets one command after another make the tables of a database, which MLflow would do in all of them at once.

    For a SQLite file see `_create_database`; a server does it itself.
    """
    kind = urllib.parse.urlsplit(store).scheme.partition("+")[0]
    if kind not in DATABASE_LOCKS:
        yield
        return
    import sqlalchemy

    lock, unlock = DATABASE_LOCKS[kind]
    engine = sqlalchemy.create_engine(store)
    try:
        with engine.connect() as connection:
            connection.execute(sqlalchemy.text(lock))
            try:
                yield
            finally:
                connection.execute(sqlalchemy.text(unlock))
    finally:
        engine.dispose()


def _experiment_id(client: Any, name: str, location: str | None) -> str:
    """Returns the id of an experiment, which is made where there is none; another command may make it meanwhile."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            client.create_experiment(name, artifact_location=location)
        except MlflowException:
            if client.get_experiment_by_name(name) is None:
                raise
        found = client.get_experiment_by_name(name)
    if found.lifecycle_stage == "deleted":
        raise PipelineError(
            f"tracking.experiment is {name!r}, which was deleted in MLflow; restore it (mlflow experiments restore "
            f"--experiment-id {found.experiment_id}) or set tracking.experiment to another name"
        )
    experiment_id = str(found.experiment_id)
    if "mlflow.experimentKind" not in found.tags:  # new, or made by an earlier version
        for key, value in experiment_page.tags_of(experiment_id).items():
            client.set_experiment_tag(experiment_id, key, value)
    return experiment_id


def follow_move(output_dir: Path) -> None:
    """Lets the experiments of a SQLite file have their artifacts beside it, wherever both were moved or copied to.

    MLflow stores the place as an absolute address: artifacts of a moved output directory would go to the old place.
    """
    wanted = (output_dir / ARTIFACTS).as_uri()
    with contextlib.closing(sqlite3.connect(output_dir / DATABASE, timeout=LOCK_SECONDS)) as database, database:
        rows = database.execute("SELECT artifact_location FROM experiments").fetchall()
        olds = {found[0] for (text,) in rows if text and (found := OWN_ARTIFACTS.match(text))} - {wanted}
        for old in olds:
            for table, column in MOVED_COLUMNS:
                change = f"UPDATE {table} SET {column} = ? || substr({column}, ?)"
                database.execute(
                    f"{change} WHERE {column} = ? OR {column} LIKE ? || '/%'", (wanted, len(old) + 1, old, old)
                )
            log.info("MLflow: output_dir was moved; artifacts are in %s now", output_dir / ARTIFACTS)


@contextlib.contextmanager
def store_errors(store: str) -> Iterator[None]:
    """Turns errors of MLflow and of the network into StoreLost."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        is_asked_wrongly = getattr(error, "error_code", None) in ASKED_WRONGLY
        advice = "" if is_asked_wrongly else "; when it is well again, run the same command to go on"
        raise StoreLost(f"MLflow at {store}: {reason}{advice}") from error


def _require_address(uri: str | None, output_dir: Path) -> None:
    """Raises PipelineError for an address that MLflow would take for something else."""
    if uri is None:
        odd = sorted({character for character in str(output_dir.resolve()) if character in UNQUOTABLE})
        if odd:
            raise PipelineError(
                f"output_dir is {output_dir}; with {' '.join(odd)} in its path MLflow's SQLite file has no address: "
                "name another directory, set tracking.uri, or tracking.enabled=false"
            )
        return
    scheme = urllib.parse.urlsplit(uri).scheme.partition("+")[0]
    if scheme not in SCHEMES:
        raise PipelineError(
            f"tracking.uri is {uri}; it must begin with one of {', '.join(f'{name}://' for name in SCHEMES)}: "
            f"http://{uri} for a server, sqlite:///{uri} for a file"
        )


def require_driver(store: str) -> None:
    """Raises PipelineError when the driver of a database is not installed."""
    if is_server(store) or store.startswith("file:"):
        return
    import sqlalchemy

    try:
        sqlalchemy.make_url(store).get_dialect().import_dbapi()
    except (ImportError, sqlalchemy.exc.SQLAlchemyError) as error:
        raise PipelineError(
            f"tracking.uri is {store}; its driver cannot be loaded ({error}): install it, for PostgreSQL pip install "
            "psycopg2-binary"
        ) from error


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
    if is_read_only(output_dir):
        raise PipelineError(
            f"output_dir is {output_dir}, which is read-only; set tracking.uri to a server or tracking.enabled=false "
            "to use what is there, or output_dir to a directory that can be written"
        )


def is_read_only(output_dir: Path) -> bool:
    """Returns whether a directory that is there cannot be written."""
    return output_dir.is_dir() and not os.access(output_dir, os.W_OK)


def database_uri(output_dir: Path) -> str:
    """Returns the URI of the SQLite file under an output directory."""
    return f"sqlite:///{output_dir.resolve() / DATABASE}"


def is_server(uri: str) -> bool:
    """Returns whether a tracking URI is that of a server."""
    return uri.startswith(("http://", "https://"))
