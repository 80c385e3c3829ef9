"""Computes fingerprints of values and files; that of a large file is remembered until the file is touched."""

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.artifacts import storage
from pipeline.artifacts.files import write_json

REMEMBERED_BYTES = 2**28  # from this size on reading a file takes longer than anyone likes to wait twice


def canonical_json(value: Any) -> str:
    """Returns one spelling for equal values: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def fingerprint_of(value: Any) -> str:
    """Returns the sha256 (hex) of a JSON value's canonical spelling."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested mappings as one, by dotted name; empty mappings stay."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def file_sha256(path: Path) -> str:
    """Returns the sha256 (hex) of a file's bytes."""
    return storage.sha256(path)


def remembered_sha256(path: Path, memory: Path | None) -> str:
    """Returns `file_sha256`, remembered in the JSON file `memory` for as long as a large file is not touched.

    A file is recognised by its path, size, modification time and inode: a hundred gigabytes take minutes to read.
    Without `memory`, and for small files, the file is read.
    """
    real = path.resolve()
    found = real.stat()
    if memory is None or found.st_size < REMEMBERED_BYTES:
        return file_sha256(real)
    mark = [found.st_size, found.st_mtime_ns, found.st_ino]
    entry = _remembered(memory).get(str(real), {})
    if entry.get("mark") != mark or entry.get("check") != _check(mark, entry.get("sha256")):
        digest = file_sha256(real)
        entry = {"mark": mark, "sha256": digest, "check": _check(mark, digest)}
        with contextlib.suppress(OSError):  # on a disk that cannot be written to, the file is read again next time
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_json(memory, _remembered(memory) | {str(real): entry})
    return entry["sha256"]


def _remembered(memory: Path) -> dict[str, dict[str, Any]]:
    """Returns what is remembered; nothing where the file is damaged, for it only saves time."""
    try:
        known = json.loads(memory.read_text())
        return {name: entry for name, entry in known.items() if isinstance(entry, dict)}
    except (OSError, ValueError, AttributeError):
        return {}


def _check(mark: list[int], digest: Any) -> str:
    return fingerprint_of([mark, digest])
