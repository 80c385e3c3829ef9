"""Directories that are complete or absent, what is written in them, and how two of them are told apart.

An artifact is built in a scratch directory beside its final place. `seal` checksums every file, writes
`manifest.json` last and renames the directory: a reader that finds no manifest finds no artifact. A stage
that is killed leaves its scratch directory, which the same command picks up again. In a bucket nothing can be
renamed: there an artifact is built in its place, and its manifest alone makes it complete.
"""

import contextlib
import dataclasses
import errno
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import places
from pipeline.errors import MissingArtifact, PipelineError
from pipeline.places import BucketPath, Place

REMEMBERED_BYTES = 2**28  # from this size on reading a file takes longer than anyone likes to wait twice
MANIFEST = "manifest.json"
CONTRACT = "contract.json"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "easydel", "transformers", "tensorstore", "safetensors", "numpy", "gguf")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Artifact:
    """A complete artifact.

    `fingerprint` is the sha256 over the names and sha256s of its files, the contract's aside; `settings` are the
    values that decided its bytes; `contract` is what travels to the next stage.
    """

    path: Place
    kind: str
    fingerprint: str
    settings: dict[str, Any]
    contract: dict[str, Any]
    files: dict[str, dict[str, Any]]


def canonical_json(value: Any) -> str:
    """One spelling for equal values: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def fingerprint_of(value: Any) -> str:
    """sha256 (hex) of a JSON value's canonical spelling."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    return places.sha256(path)


def remembered_sha256(path: Path, memory: Path | None) -> str:
    """`file_sha256`, kept in the JSON file `memory` for as long as a large file is not touched.

    What a file is known by is its place, size, time of change and number: a hundred gigabytes take minutes to read.
    """
    real = path.resolve()
    found = real.stat()
    if memory is None or found.st_size < REMEMBERED_BYTES:
        return file_sha256(real)
    known = json.loads(memory.read_text()) if memory.is_file() else {}
    mark = [found.st_size, found.st_mtime_ns, found.st_ino]
    entry = known.get(str(real))
    if entry is None or entry["mark"] != mark:
        entry = {"mark": mark, "sha256": file_sha256(real)}
        memory.parent.mkdir(parents=True, exist_ok=True)
        known = json.loads(memory.read_text()) if memory.is_file() else {}  # another command may have added to it
        write_json(memory, known | {str(real): entry})
    return entry["sha256"]


def address(root: Path, kind: str, name: str, settings: Mapping[str, Any]) -> Path:
    """Where the artifact made with exactly these settings lives: `<root>/<kind>/<name>-<12 hex digits>`.

    Settings name the parents by fingerprint, so a change upstream changes every address downstream and
    nothing is ever overwritten.
    """
    return root / kind / f"{name}-{fingerprint_of(settings)[:12]}"


def exists(path: Place) -> bool:
    """Whether a complete artifact stands at `path`."""
    return (path / MANIFEST).is_file()


def read(path: Place, kind: str, *, make_with: str, verify: bool = False) -> Artifact:
    """Open the artifact of `kind` at `path`; with `verify`, compare every file's sha256.

    The manifest's and the contract's are compared in any case. Raises MissingArtifact when there is none (`make_with`
    tells the command that makes it) and PipelineError when it is of another kind or its files are missing or changed
    (all of them named).
    """
    if not exists(path):
        scratch = scratch_of(path)
        state = f"an unfinished one is at {scratch}" if scratch.exists() else "nothing is there"
        raise MissingArtifact(f"no complete {kind} at {path} ({state}); make it with: {make_with}")
    manifest = read_manifest(path)
    if manifest["kind"] != kind:
        raise PipelineError(f"{path} holds a {manifest['kind']}, wanted a {kind}; give the path of a {kind}")
    damaged = places.damage(path, manifest["files"], verify=verify)
    if not damaged and not verify:
        damaged = places.damage(path, {CONTRACT: manifest["files"][CONTRACT]}, verify=True)
    if damaged:
        listed = "\n  ".join(damaged)
        raise PipelineError(f"{kind} at {path} is damaged; delete the directory and run: {make_with}\n  {listed}")
    contract = json.loads((path / CONTRACT).read_text())
    return Artifact(
        path=path,
        kind=kind,
        fingerprint=manifest["fingerprint"],
        settings=manifest["settings"],
        contract=contract,
        files=manifest["files"],
    )


def read_manifest(path: Place) -> dict[str, Any]:
    """The manifest of the artifact at `path`; PipelineError when it is not as it was written."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        written = {key: manifest[key] for key in ("kind", "fingerprint", "settings", "files")}
        if manifest["sha256"] == fingerprint_of(written):
            return written
    except (ValueError, KeyError, TypeError):  # no JSON, no UTF-8, or another document
        pass
    raise PipelineError(f"{path / MANIFEST} is damaged; delete {path} and make it again")


def scratch_of(path: Place) -> Place:
    """The directory in which the artifact of `path` is built; in a bucket, its own place."""
    return path if isinstance(path, BucketPath) else path.with_name(path.name + ".partial")


def open_scratch(path: Path, *, resume: bool) -> Path:
    """Make (or, with `resume`, find again) the scratch directory of `path`."""
    scratch = scratch_of(path)
    if scratch.exists() and not resume:
        shutil.rmtree(scratch)
    scratch.mkdir(parents=True, exist_ok=True)
    return scratch


def seal(
    path: Place,
    *,
    kind: str,
    settings: Mapping[str, Any],
    contract: Mapping[str, Any],
    listed: Sequence[str] | None = None,
) -> Artifact:
    """Complete the artifact being built in `scratch_of(path)`: contract, checksums, manifest last, rename.

    `listed` are the files that the manifest names, where they vouch for all others with sha256s of their own.
    """
    scratch = scratch_of(path)
    if isinstance(scratch, BucketPath):
        _keep_or_write(scratch / CONTRACT, contract)
    else:
        for torn in scratch.rglob("*.tmp"):  # of a run that was killed inside write_bytes
            torn.unlink()
        write_json(scratch / CONTRACT, contract)
    names = {CONTRACT, *(places.files(scratch) if listed is None else listed)} - {MANIFEST}
    files = {name: places.entry(scratch / name) for name in sorted(names)}
    # provenance may differ between two makings of the same bytes: it does not enter the fingerprint
    fingerprint = fingerprint_of({name: entry["sha256"] for name, entry in files.items() if name != CONTRACT})
    manifest = {"kind": kind, "fingerprint": fingerprint, "settings": dict(settings), "files": files}
    write_json(scratch / MANIFEST, manifest | {"sha256": fingerprint_of(manifest)})
    if isinstance(path, Path):
        _rename(scratch, path)
    return read(path, kind, make_with="the same command again")


def _keep_or_write(place: BucketPath, contract: Mapping[str, Any]) -> None:
    """Write a contract, unless one is there that differs in who made it alone.

    Two commands may complete one artifact in a bucket at the same time: so both write the same manifest.
    """
    if place.is_file():
        found = json.loads(place.read_text())
        if {**found, "provenance": None} == {**json.loads(json.dumps(contract)), "provenance": None}:
            return
    write_json(place, contract)


def _rename(scratch: Path, path: Path) -> None:
    if path.exists():  # left by hand or by another run: an artifact never replaces a complete one
        if exists(path):
            raise PipelineError(f"{path} appeared while it was being built; delete {scratch} to keep that one")
        shutil.rmtree(path)
    os.rename(scratch, path)
    sync_directory(path.parent)


def write_json(path: Place, value: Any) -> None:
    """Write JSON so that the file is whole or absent: scratch file, fsync, rename."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def write_bytes(path: Place, data: bytes) -> None:
    """Write a file so that it is whole or absent: scratch file, fsync, rename."""
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
    """Make a rename inside `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk under `path` into one PipelineError; nothing complete is touched."""
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
    """What is free on the disk that `path` is, or will be, on."""
    path = path.absolute()
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free


def require_free_space(path: Path, needed_bytes: int, what: str) -> None:
    """Raise PipelineError before any work when `needed_bytes` do not fit on the disk of `path`."""
    free = free_bytes(path)
    if needed_bytes > free:
        raise PipelineError(
            f"{what} needs {needed_bytes / 2**20:.0f} MiB at {path}, {free / 2**20:.0f} MiB are free; "
            "free some space or set output_dir to another disk"
        )


def provenance(stage: str, config: Mapping[str, Any], parents: Mapping[str, str]) -> dict[str, Any]:
    """Who made an artifact: stage, resolved config, git commit, package versions, parents' fingerprints.

    No clock and no host name: an artifact made twice has the same bytes.
    """
    return {
        "stage": stage,
        "config": dict(config),
        "git_commit": git_commit(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "parents": dict(parents),
    }


def git_commit() -> str:
    """The commit of the code that runs, or `unknown` outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.stdout.strip()
