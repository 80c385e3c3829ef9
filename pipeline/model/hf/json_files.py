"""Reads the JSON files of an HF directory."""

import json
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError


def read_object(file: Path, advice: str) -> dict[str, Any]:
    """Returns the object in a JSON file, with or without a byte order mark.

    Raises PipelineError when the file is not there (with the advice), is not JSON, or holds something else.
    """
    if not file.is_file():
        raise PipelineError(f"no {file.name} in {file.parent}; {advice}")
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PipelineError(f"{file} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise PipelineError(f"{file} holds a {type(found).__name__}, wanted an object of keys and values")
    return found
