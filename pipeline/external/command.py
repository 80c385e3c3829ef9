"""Runs another program once; its arguments name a JSON file to read and one to write."""

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError

ERROR_LINES = 5


def run_json(command: Sequence[str], request: dict[str, Any], key: str) -> dict[str, Any]:
    """Returns what the command answers to `request`; `key` is the setting that holds the command.

    Raises PipelineError with the end of its stderr when the command fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        request_file, answer_file = Path(folder) / "in.json", Path(folder) / "out.json"
        request_file.write_text(json.dumps(request))
        try:
            ended = subprocess.run([*command, str(request_file), str(answer_file)], capture_output=True, text=True)
        except OSError as error:
            raise PipelineError(f"{key} cannot be run: {error}; give a program and its arguments") from error
        if ended.returncode or not answer_file.is_file():
            errors = "\n  ".join(ended.stderr.splitlines()[-ERROR_LINES:])
            raise PipelineError(f"{key} {' '.join(command)} ended with {ended.returncode}:\n  {errors}")
        return json.loads(answer_file.read_text())
