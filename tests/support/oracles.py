"""Runs the oracles: torch programs in an environment of their own that never import `pipeline`."""

import os
import subprocess
from pathlib import Path

TESTS = Path(__file__).resolve().parent
STDERR_TAIL_CHARACTERS = 4000
TIMEOUT_SECONDS = 600


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

    Raises AssertionError with the end of the script's stderr when it fails, and RuntimeError when
    there is no environment to run it in.
    """
    command = [str(oracle_python()), str(TESTS / "oracles" / f"{script}.py")]
    for key, value in options.items():
        command += [f"--{key}", str(value)]
    result = subprocess.run(command, env=oracle_variables(), capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    if result.returncode != 0:
        raise AssertionError(
            f"oracle {script} ended with {result.returncode}: {' '.join(command)}\n"
            f"{result.stderr[-STDERR_TAIL_CHARACTERS:]}"
        )


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
