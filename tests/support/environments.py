"""Environments of other programs, each with one runtime that opens drafts; `make conformance-env` builds them."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from tests.support.oracles import STDERR_TAIL_CHARACTERS, TIMEOUT_SECONDS, oracle_variables
from tests.support.paths import TESTS


def python_of(name: str) -> Path:
    """The interpreter of an environment under $CONFORMANCE_VENVS; RuntimeError when there is none."""
    root = Path(os.environ.get("CONFORMANCE_VENVS") or TESTS.parent / ".venv-conformance")
    path = root / name / "bin" / "python"
    if not path.is_file():
        raise RuntimeError(f"no environment {name} at {path}; run `make conformance-env`")
    return path


def told_by(environment: str, program: str, **options: object) -> dict[str, Any]:
    """The JSON on the last line that tests/conformance/<program>.py prints, run offline and on the CPU.

    Raises AssertionError with the end of its stderr when it fails.
    """
    command = [str(python_of(environment)), "-W", "ignore", str(TESTS / "conformance" / f"{program}.py")]
    for key, value in options.items():
        command += [f"--{key}", str(value)]
    variables = oracle_variables() | {"JAX_PLATFORMS": "cpu"}
    result = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    if result.returncode != 0:
        raise AssertionError(
            f"{program} ended with {result.returncode}: {' '.join(command)}\n{result.stderr[-STDERR_TAIL_CHARACTERS:]}"
        )
    line = result.stdout.splitlines()[-1]
    print(f"{environment}: {line}")
    return json.loads(line)
