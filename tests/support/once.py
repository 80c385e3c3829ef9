"""Pytest plugin: directories that are made once in a run, by whichever process of pytest-xdist needs them first.

They are read only: what several tests read, and no test changes. At the end of the run each must hold the files that it
held when it was made.
"""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

RUN_DIRECTORY = "TESTS_RUN_DIRECTORY"  # of the environment: the processes of a run find each other's directories by it


def directory(name: str, make: Callable[[Path], None]) -> Path:
    """The directory that `make` has filled, in this process or in another of the run; AssertionError where it failed.

    Others wait while one makes it. A `make` that failed is not tried again.
    """
    run = Path(os.environ[RUN_DIRECTORY])
    path, made, failed = run / name, run / f"{name}.json", run / f"{name}.failed"
    with open(run / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert not failed.exists(), f"{name} could not be made: {failed.read_text()}"
        if not made.exists():
            path.mkdir()
            try:
                make(path)
            except BaseException as error:
                failed.write_text(repr(error))
                raise
            made.write_text(json.dumps(_files(path)))
    return path


def _files(path: Path) -> dict[str, list[int]]:
    """Size and time of the last change of every file."""
    found = {file: file.stat() for file in sorted(path.rglob("*")) if file.is_file()}
    return {str(file.relative_to(path)): [stat.st_size, stat.st_mtime_ns] for file, stat in found.items()}


def changed(run: Path) -> list[str]:
    """Files below the directories made in a run that were changed, added or deleted since."""
    found = []
    for record in sorted(run.glob("*.json")):
        before, now = json.loads(record.read_text()), _files(run / record.stem)
        found += [f"{record.stem}/{name}" for name in before | now if before.get(name) != now.get(name)]
    return found


def pytest_configure(config: pytest.Config) -> None:
    """Gives the run its directory, which goes with it."""
    if not hasattr(config, "workerinput"):
        run = Path(tempfile.mkdtemp(prefix="tests-run-"))
        os.environ[RUN_DIRECTORY] = str(run)
        config.add_cleanup(lambda: shutil.rmtree(run, ignore_errors=True))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails the run when a test changed what others read too."""
    if hasattr(session.config, "workerinput"):
        return
    if found := changed(Path(os.environ[RUN_DIRECTORY])):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        reporter.write_line(f"\nshared by tests, and changed by one: {found}", red=True)
