"""Another program, run once: it is given the names of a JSON file to read and of one to write."""

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError

ERROR_LINES = 5


def run_json(command: Sequence[str], given: dict[str, Any], key: str) -> dict[str, Any]:
    """What the command answers to `given`; `key` is the setting that it comes from.

    Raises PipelineError with the end of what it said when it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked, told = Path(folder) / "in.json", Path(folder) / "out.json"
        asked.write_text(json.dumps(given))
        try:
            made = subprocess.run([*command, str(asked), str(told)], capture_output=True, text=True)
        except OSError as error:
            raise PipelineError(f"{key} cannot be run: {error}; give a program and its arguments") from error
        if made.returncode or not told.is_file():
            said = "\n  ".join(made.stderr.splitlines()[-ERROR_LINES:])
            raise PipelineError(f"{key} {' '.join(command)} ended with {made.returncode}:\n  {said}")
        return json.loads(told.read_text())
