"""MLflow's store in PostgreSQL (Debian's package, a cluster of its own): eight first commands lose nothing."""

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.environments import python_of
from tests.support.ports import free_port
from tests.tracking.test_run import WRITER, commands_at_once, require_nothing_lost

pytestmark = [pytest.mark.conformance, pytest.mark.slow]  # its driver is in an environment of its own


def as_user(*command):
    """PostgreSQL refuses to run as root; its package has a user of its own."""
    return ["runuser", "-u", "postgres", "--", *command] if os.geteuid() == 0 else list(command)


@pytest.fixture
def database(tmp_path):
    """The address of an empty database."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        raise RuntimeError("no PostgreSQL here; install it: apt-get install postgresql")
    folder, port = Path(f"/tmp/pipeline-postgres-{os.getpid()}"), free_port()  # its user cannot enter pytest's folders
    folder.mkdir()
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres")
    data, options = folder / "data", f"-k {folder} -p {port} -c listen_addresses=127.0.0.1 -c fsync=off"
    control = str(programs[-1] / "pg_ctl")
    subprocess.run(
        as_user(str(programs[-1] / "initdb"), "-D", str(data), "-U", "me", "-A", "trust"), check=True, cwd="/"
    )
    started = as_user(control, "-D", str(data), "-w", "-o", options, "-l", str(folder / "log"), "start")
    subprocess.run(started, check=True, cwd="/")
    try:
        yield f"postgresql+pg8000://me@127.0.0.1:{port}/postgres"
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            subprocess.run(as_user(control, "-D", str(data), "-m", "immediate", "stop"), check=True, cwd="/")
        shutil.rmtree(folder)


def test_eight_first_commands_at_once_lose_nothing(tmp_path, database, monkeypatch):
    (driver,) = python_of("postgres").parents[1].glob("lib/python*/site-packages")  # pure Python: any interpreter's
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path.cwd()), str(driver)]))
    monkeypatch.syspath_prepend(str(driver))
    commands_at_once(tmp_path, 8, WRITER, database)
    require_nothing_lost(database, 8)
