"""A stage that a SIGKILL ends in the middle of its work."""

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from pipeline.config.schema import PipelineConfig
from tests.support.paths import ROOT


def kill_when_stopped(
    program: str, config: PipelineConfig, directory: Path, *arguments: str, environment: Mapping[str, str] | None = None
) -> None:
    """Runs `program` in a process until it prints "stopped", then kills it.

    Its arguments are the path of the pickled configuration, which is written into `directory`, and `arguments`.
    """
    pickled = directory / "config.pickle"
    pickled.write_bytes(pickle.dumps(config))
    with subprocess.Popen(
        [sys.executable, "-c", program, str(pickled), *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        printed = process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        errors = process.stderr.read()
    assert printed == "stopped\n", errors
