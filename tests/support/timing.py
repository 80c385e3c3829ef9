"""Pytest plugin: writes what each test cost, as JSON, to the file given with `--outcomes`.

Each test has its outcome, its wall seconds (fixtures that it was the first to need are its own), the CPU seconds of the
test process itself and those of the programs that it started and waited for. Wall time depends on what else the machine
does, CPU time hardly. `python -m tests.support.timing FILE` prints the sums of each test file.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import pytest

_programs_seconds = 0.0  # of programs that live longer than a test, as they tell themselves
COLUMNS = ("seconds", "own_cpu_seconds", "programs_cpu_seconds")


def add_program_seconds(seconds: float) -> None:
    """Counts CPU seconds that a program which goes on living spent for the running test."""
    global _programs_seconds
    _programs_seconds += seconds


def _cpu_seconds() -> tuple[float, float]:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time(), children.ru_utime + children.ru_stime + _programs_seconds


class _Outcomes:
    """Collects reports in the process that pytest was started in; measures in each that runs tests."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.tests: dict[str, dict[str, Any]] = {}
        self.before = _cpu_seconds()

    def pytest_runtest_logstart(self) -> None:
        """Starts at the first test, behind the collection."""
        if not self.tests:
            self.before = _cpu_seconds()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Any:
        """Adds to a phase's report the CPU seconds since the phase before."""
        report = yield
        now = _cpu_seconds()
        report.own_cpu_seconds, report.programs_cpu_seconds = (b - a for a, b in zip(self.before, now, strict=True))
        self.before = now
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Adds a phase to its test; a test has failed when one of its phases has."""
        test = self.tests.setdefault(report.nodeid, {"outcome": "passed"} | dict.fromkeys(COLUMNS, 0.0))
        if report.outcome != "passed":
            test["outcome"] = report.outcome
        test["seconds"] += report.duration
        test["own_cpu_seconds"] += getattr(report, "own_cpu_seconds", 0.0)
        test["programs_cpu_seconds"] += getattr(report, "programs_cpu_seconds", 0.0)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Writes the file, unless this process is a worker of pytest-xdist."""
        if not hasattr(session.config, "workerinput"):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(json.dumps(self.tests, indent=1))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--outcomes FILE`."""
    parser.addoption("--outcomes", type=Path, help="write each test's outcome and seconds to this file, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    """Measures only where it was asked for."""
    if file := config.getoption("--outcomes"):
        config.pluginmanager.register(_Outcomes(file))


def by_file(tests: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The sums of each test file, the most expensive first."""
    files: dict[str, dict[str, float]] = {}
    for name, test in tests.items():
        sums = files.setdefault(name.split("::")[0], dict.fromkeys(COLUMNS, 0.0))
        for column in COLUMNS:
            sums[column] += test[column]
    return dict(sorted(files.items(), key=lambda item: -item[1]["own_cpu_seconds"] - item[1]["programs_cpu_seconds"]))


def main() -> None:
    """Prints the sums of each test file and of all."""
    files = by_file(json.loads(Path(sys.argv[1]).read_text()))
    total = {column: sum(sums[column] for sums in files.values()) for column in COLUMNS}
    print(*(f"{column:>22}" for column in COLUMNS))
    for name, sums in (*files.items(), ("all", total)):
        print(*(f"{sums[column]:22.1f}" for column in COLUMNS), name)


if __name__ == "__main__":
    main()
