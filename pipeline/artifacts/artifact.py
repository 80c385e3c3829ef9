"""Artifacts: directories that are complete or absent, and how two of them are distinguished.

An artifact is built in a scratch directory beside its final path. `seal` checksums every file, writes `manifest.json`
last and renames the directory: a reader that finds no manifest finds no artifact. A stage that is killed leaves its
scratch directory, which the same command picks up again. In a bucket nothing can be renamed: there an artifact is built
at its final prefix, and its manifest alone makes it complete.
"""

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import shutil
import socket
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.artifacts import storage
from pipeline.artifacts.files import sync_directory, write_json
from pipeline.artifacts.hashing import fingerprint_of, flatten, remembered_sha256
from pipeline.artifacts.storage import BucketPath, StoragePath
from pipeline.errors import MissingArtifact, PipelineError

log = logging.getLogger("pipeline")

MANIFEST = "manifest.json"
CONTRACT = "contract.json"
MANIFEST_FORMAT = 2  # of manifests
FIELDS = {  # what a manifest of each format holds besides its own sha256
    1: ("kind", "fingerprint", "settings", "files"),
    2: ("format", "kind", "key", "fingerprint", "settings", "parents", "files"),
}
KEY_DIGITS = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parent:
    """Identifies what an artifact was made from: its key, and the fingerprint of the very artifact that was read."""

    key: str
    fingerprint: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Artifact:
    """Describes a complete artifact.

    `key` is computed from the settings that decide its bytes and from its parents' keys, before it is made;
    `fingerprint` is the sha256 over the names and sha256s of its files, the contract's aside. `settings` are by dotted
    name; `contract` is what travels to the next stage. Those with a manifest of format 1 have no key and no parents.
    """

    path: StoragePath
    kind: str
    key: str | None
    fingerprint: str
    settings: dict[str, Any]
    parents: dict[str, Parent]
    contract: dict[str, Any]
    files: dict[str, dict[str, Any]]


def key_of(kind: str, version: int, settings: Mapping[str, Any], parents: Mapping[str, str]) -> str:
    """Returns the key of the artifact that is made with exactly these settings from parents with these keys.

    `version` rises when the program makes other bytes of equal settings.
    """
    return fingerprint_of({"kind": kind, "version": version, "settings": settings, "parents": parents})[:KEY_DIGITS]


def address(root: Path, kind: str, name: str, key: str) -> Path:
    """Returns where the artifact of this key is put: `<root>/<kind>/<name>-<key>`.

    A change of a setting changes the addresses of all that is made from it, and nothing is ever overwritten.
    """
    return root / kind / f"{name}-{key}"


def exists(path: StoragePath) -> bool:
    """Returns whether a complete artifact is at `path`."""
    return (path / MANIFEST).is_file()


def read(path: StoragePath, kind: str, *, make_with: str, verify: bool = False) -> Artifact:
    """Opens the artifact of `kind` at `path`; with `verify`, compares every file's sha256.

    The manifest's and the contract's are compared in any case. Raises MissingArtifact when there is none (`make_with`
    is the command that makes it) and PipelineError when it is of another kind or its files are missing or changed
    (all of them named).
    """
    if not exists(path):
        scratch = scratch_of(path)
        state = f"an unfinished one is at {scratch}" if scratch.exists() else "nothing is there"
        raise MissingArtifact(f"no complete {kind} at {path} ({state}); make it with: {make_with}")
    manifest = read_manifest(path)
    if manifest["kind"] != kind:
        raise PipelineError(f"{path} holds a {manifest['kind']}, wanted a {kind}; give the path of a {kind}")
    damaged = storage.damaged_files(path, manifest["files"], verify=verify)
    if not damaged and not verify:
        damaged = storage.damaged_files(path, {CONTRACT: manifest["files"][CONTRACT]}, verify=True)
    _require_undamaged(path, kind, damaged, make_with)
    return Artifact(
        path=path,
        kind=kind,
        key=manifest.get("key"),
        fingerprint=manifest["fingerprint"],
        settings=flatten(manifest["settings"]),  # those of a manifest of format 1 are nested
        parents={name: Parent(**parent) for name, parent in manifest.get("parents", {}).items()},
        contract=json.loads((path / CONTRACT).read_text()),
        files=manifest["files"],
    )


def require_intact(artifact: Artifact, names: Collection[str], *, make_with: str, memory: Path | None = None) -> None:
    """Compares the sha256s of files that are about to be read; raises one PipelineError that names all that differ.

    Those of large files on a disk are remembered in `memory` for as long as the files are not touched.
    """
    if isinstance(artifact.path, BucketPath):
        damaged = storage.damaged_files(artifact.path, {name: artifact.files[name] for name in names}, verify=True)
    else:
        found = {name: remembered_sha256(artifact.path / name, memory) for name in names}
        damaged = [f"{name}: {storage.CHANGED}" for name in names if found[name] != artifact.files[name]["sha256"]]
    _require_undamaged(artifact.path, artifact.kind, damaged, make_with)


def _require_undamaged(path: StoragePath, kind: str, damaged: Sequence[str], make_with: str) -> None:
    if damaged:
        listed = "\n  ".join(damaged)
        raise PipelineError(f"{kind} at {path} is damaged; delete the directory and run: {make_with}\n  {listed}")


def read_manifest(path: StoragePath) -> dict[str, Any]:
    """Returns the manifest of the artifact at `path`; raises PipelineError when it is not as it was written."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        written = {field: manifest[field] for field in FIELDS[manifest.get("format", 1)]}
        if manifest["sha256"] == fingerprint_of(written):
            return written
    except (ValueError, KeyError, TypeError, AttributeError):  # no JSON, no UTF-8, or another document
        pass
    raise PipelineError(f"{path / MANIFEST} is damaged; delete {path} and make it again")


def scratch_of(path: StoragePath) -> StoragePath:
    """Returns the directory in which the artifact of `path` is built; in a bucket, its final prefix."""
    return path if isinstance(path, BucketPath) else local_scratch_of(path)


def local_scratch_of(path: Path) -> Path:
    """Returns the directory in which the artifact of a path of this machine is built."""
    return path.with_name(path.name + ".partial")


def open_scratch(path: Path, *, resume: bool) -> Path:
    """Makes (or, with `resume`, finds again) the scratch directory of `path`."""
    scratch = local_scratch_of(path)
    if scratch.exists() and not resume:
        shutil.rmtree(scratch)
    scratch.mkdir(parents=True, exist_ok=True)
    return scratch


@contextlib.contextmanager
def exclusive(path: StoragePath, part: str = "") -> Iterator[None]:
    """Lets one command at a time build the artifact of `path`, or a `part` of it that commands share out.

    A second one waits and says for whom; what it finds then may be complete. In a bucket nothing can be locked: all
    commands write the same bytes there. A lock ends with its process, however that ends.
    """
    if isinstance(path, BucketPath):
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_name(f"{path.name}{part}.lock")
    with open(file, "a+") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            opened.seek(0)
            log.info("%s is being made by %s; waiting for it to end", path, opened.read().strip() or "another command")
            fcntl.flock(opened, fcntl.LOCK_EX)
        except OSError as error:  # a file system without locks
            log.warning("%s cannot be locked (%s); run one command at a time on it", file, error.strerror)
        opened.truncate(0)
        opened.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        opened.flush()
        try:
            yield
        finally:
            if exists(path):
                file.unlink(missing_ok=True)


def seal(
    path: StoragePath,
    *,
    kind: str,
    key: str,
    settings: Mapping[str, Any],
    parents: Mapping[str, Parent],
    contract: Mapping[str, Any],
    listed: Sequence[str] | None = None,
) -> Artifact:
    """Completes the artifact being built in `scratch_of(path)`: contract, checksums, manifest last, rename.

    `listed` are the files that the manifest names, where they vouch for all others with sha256s of their own.
    """
    scratch = scratch_of(path)
    if isinstance(scratch, BucketPath):
        _keep_or_write(scratch / CONTRACT, contract)
    else:
        for torn in scratch.rglob("*.tmp"):  # of a run that was killed inside write_bytes
            torn.unlink()
        write_json(scratch / CONTRACT, contract)
    names = {CONTRACT, *(storage.list_files(scratch) if listed is None else listed)} - {MANIFEST}
    files = {name: storage.file_record(scratch / name) for name in sorted(names)}
    # provenance may differ between two makings of the same bytes: it does not enter the fingerprint
    fingerprint = fingerprint_of({name: entry["sha256"] for name, entry in files.items() if name != CONTRACT})
    manifest = {
        "format": MANIFEST_FORMAT,
        "kind": kind,
        "key": key,
        "fingerprint": fingerprint,
        "settings": dict(settings),
        "parents": {name: dataclasses.asdict(parent) for name, parent in parents.items()},
        "files": files,
    }
    write_json(scratch / MANIFEST, manifest | {"sha256": fingerprint_of(manifest)})
    if isinstance(path, Path):
        _rename(local_scratch_of(path), path)
    return read(path, kind, make_with="the same command again")


def _keep_or_write(path: BucketPath, contract: Mapping[str, Any]) -> None:
    """Writes a contract, unless one is there that differs in its provenance alone.

    Two commands may complete one artifact in a bucket at the same time: so both write the same manifest.
    """
    if path.is_file():
        found = json.loads(path.read_text())
        if {**found, "provenance": None} == {**json.loads(json.dumps(contract)), "provenance": None}:
            return
    write_json(path, contract)


def _rename(scratch: Path, path: Path) -> None:
    if path.exists():  # left by hand or by another run: an artifact never replaces a complete one
        if exists(path):
            raise PipelineError(f"{path} appeared while it was being built; delete {scratch} to keep that one")
        shutil.rmtree(path)
    os.rename(scratch, path)
    sync_directory(path.parent)
