"""Writes files that are whole or absent, and reports full disks."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.artifacts.storage import BucketPath, StoragePath
from pipeline.errors import PipelineError


def write_json(path: StoragePath, value: Any) -> None:
    """Writes JSON so that the file is whole or absent: scratch file, fsync, rename."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def write_bytes(path: StoragePath, data: bytes) -> None:
    """Writes a file so that it is whole or absent: scratch file, fsync, rename."""
    if isinstance(path, BucketPath):
        path.write_bytes(data)
        return
    scratch = path.with_name(path.name + ".tmp")
    with open(scratch, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.rename(scratch, path)


def sync_directory(path: Path) -> None:
    """Makes a rename inside `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns a full or read-only disk under `path` into one PipelineError; nothing complete is touched."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        number = error.errno if isinstance(error, OSError) else None
        # tensorstore reports a full disk as ValueError or RuntimeError carrying strerror's text
        texts = {errno.ENOSPC: "No space left on device", errno.EROFS: "Read-only file system"}
        found = next((text for code, text in texts.items() if number == code or text in str(error)), None)
        if found is None:
            raise
        raise PipelineError(
            f"{found} while writing {path} ({free_bytes(path) / 2**20:.0f} MiB free); free some space or set "
            "output_dir to another disk, then run the same command: it goes on from the last complete piece"
        ) from error


def free_bytes(path: Path) -> int:
    """Returns the free bytes of the disk that holds `path`, or will hold it."""
    path = path.absolute()
    return shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.exists())).free


def require_free_space(path: Path, needed_bytes: int, what: str) -> None:
    """Raises PipelineError before any work when `needed_bytes` do not fit on the disk of `path`."""
    free = free_bytes(path)
    if needed_bytes > free:
        raise PipelineError(
            f"{what} needs {needed_bytes / 2**20:.0f} MiB at {path}, {free / 2**20:.0f} MiB are free; "
            "free some space or set output_dir to another disk"
        )
