"""Runs the oracles: torch programs in an environment of their own that never import `pipeline`.

Most of them begin with the same imports of torch and transformers, which take longer than what the oracle computes. So
one process for each process of the tests imports them once, and forks for every run (`tests/oracles/worker.py`). With
`ORACLE_WORKER=0` each run is a process of its own.
"""

import atexit
import contextlib
import functools
import json
import os
import select
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from tests.support import timing
from tests.support.paths import TESTS

STDERR_TAIL_CHARACTERS = 4000
TIMEOUT_SECONDS = 600
OF_THEIR_OWN = ("draft_loss",)  # what replaces modules before its imports runs where nothing has been imported


def oracle_python() -> Path:
    """The interpreter in $ORACLE_PYTHON, else in .venv-oracle; RuntimeError when there is none."""
    path = Path(os.environ.get("ORACLE_PYTHON") or TESTS.parent / ".venv-oracle" / "bin" / "python")
    if not path.is_file():
        raise RuntimeError(f"no oracle environment at {path}; run `make oracle-env`")
    return path


def oracle_assets() -> Path:
    """GPT-OSS's tokenizer and chat template, beside the oracles' interpreter; RuntimeError when they are not there."""
    path = oracle_python().parent.parent / "assets"
    if not (path / "tokenizer.json").is_file():
        raise RuntimeError(f"no official tokenizer at {path}; run `make oracle-env`")
    return path


def run_oracle(script: str, **options: object) -> None:
    """Runs tests/oracles/<script>.py with `--key value` for each option, offline and on the CPU.

    Raises AssertionError with the end of the script's stderr when it fails or takes longer than TIMEOUT_SECONDS, and
    RuntimeError when there is no environment to run it in.
    """
    file = str(TESTS / "oracles" / f"{script}.py")
    arguments = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    alone = script in OF_THEIR_OWN or os.environ.get("ORACLE_WORKER") == "0"
    ended, stderr = _run_alone(file, arguments) if alone else _run_in_worker(file, arguments)
    if ended != "ended with 0":
        command = " ".join([str(oracle_python()), file, *arguments])
        raise AssertionError(f"oracle {script} {ended}: {command}\n{stderr[-STDERR_TAIL_CHARACTERS:]}")


def _run_alone(file: str, arguments: list[str]) -> tuple[str, str]:
    """How the run ended, and its stderr."""
    command = [str(oracle_python()), file, *arguments]
    try:
        result = subprocess.run(
            command, env=oracle_variables(), capture_output=True, text=True, timeout=TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired as late:
        return f"did not end in {TIMEOUT_SECONDS} seconds", (late.stderr or b"").decode(errors="replace")
    return f"ended with {result.returncode}", result.stderr


def _run_in_worker(file: str, arguments: list[str]) -> tuple[str, str]:
    """How the run ended, and what it printed."""
    with tempfile.NamedTemporaryFile("r", errors="replace") as stderr:
        reply = _worker().ask({"script": file, "arguments": arguments, "stderr": stderr.name})
        if reply is None:
            _worker.cache_clear()
            return f"did not end in {TIMEOUT_SECONDS} seconds, or took its worker along", stderr.read()
        timing.add_program_seconds(reply["cpu_seconds"])
        return f"ended with {reply['returncode']}", stderr.read()


class _Worker:
    """A process that has imported what oracles import, and the pipes to it."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(
            command, env=oracle_variables(), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.requests, self.replies = self.process.stdin, self.process.stdout

    def ask(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """What the worker says of a run; None, and no worker any more, when it says nothing."""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=self.requests, flush=True)
            if select.select([self.replies], [], [], TIMEOUT_SECONDS)[0] and (line := self.replies.readline()):
                return json.loads(line)
        self.end()
        return None

    def end(self) -> None:
        """Ends the worker and what runs in it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.requests, self.replies):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


@functools.cache
def _worker() -> _Worker:
    worker = _Worker([str(oracle_python()), str(TESTS / "oracles" / "worker.py")])
    atexit.register(worker.end)
    return worker


def oracle_variables() -> dict[str, str]:
    """This process's, without what would lead the oracle to our packages, a GPU or the network."""
    ours = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    return {key: value for key, value in os.environ.items() if key not in ours} | {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
