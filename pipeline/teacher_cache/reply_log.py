"""Writes replies of an endpoint to disk as they arrive: a kill loses at most the requests under way."""

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.errors import PipelineError


class ReplyLog:
    """Holds an append-only JSONL file of objects with a `key`; of two objects with the same key the later counts.

    Every line is on the disk when `append` returns. A last line that a kill left incomplete is removed. Raises
    PipelineError when another line is damaged.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        lines = path.read_bytes().split(b"\n") if path.is_file() else [b""]
        torn = len(lines.pop())
        parsed = [self._parsed(line, number) for number, line in enumerate(lines, start=1)]
        self.entries: dict[str, dict[str, Any]] = {entry["key"]: entry for entry in parsed}
        self._file = open(path, "ab")  # noqa: SIM115 (__exit__ closes it)
        if torn:
            self._file.truncate(self._file.tell() - torn)

    def __enter__(self) -> "ReplyLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, entry: dict[str, Any]) -> None:
        """Appends an entry and waits until it is on the disk."""
        self._file.write(json.dumps(entry, separators=(",", ":")).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.entries[entry["key"]] = entry

    def _parsed(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            entry = json.loads(line)
            if isinstance(entry, dict) and isinstance(entry.get("key"), str):
                return entry
        except ValueError:  # no JSON or no UTF-8
            pass
        raise PipelineError(
            f"{self._path}, line {number} is damaged; delete that line (its prompt is asked again) and run the same "
            "command"
        )
