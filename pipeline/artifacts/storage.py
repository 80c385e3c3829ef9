"""Storage paths: directories of this machine, or prefixes of buckets (`gs://bucket/prefix`, `s3://bucket/prefix`).

A file in a bucket is written whole or not at all, as the services promise, and is never renamed. Buckets are reached
through tensorstore: credentials as Google's and Amazon's own programs find them, another endpoint in
TENSORSTORE_GCS_HTTP_URL or AWS_ENDPOINT_URL.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import PipelineError

if TYPE_CHECKING:
    import tensorstore

DRIVERS = {"gs://": "gcs", "s3://": "s3"}
RETRIES = {"max_retries": 6, "initial_delay": "500ms", "max_delay": "8s"}  # tensorstore's own last many minutes
AT_ONCE = 16  # requests
CHANGED = "sha256 differs from the one written"
OF_A_SERVICE = ("retry attempts failed", "curl_code", "http_response_code")  # in what tensorstore reports


@dataclasses.dataclass(frozen=True)
class BucketPath:
    """Names a file or a prefix in a bucket, with what artifacts need of pathlib.Path. Errors name the URL."""

    url: str  # without a slash at its end

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "BucketPath":
        return BucketPath(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        """The part behind the last slash."""
        return self.url.rpartition("/")[2]

    def is_file(self) -> bool:
        """Returns whether there is an object of this name."""
        with _service_errors(self):
            return _store(self).read("", byte_range=slice(0, 0)).result().state == "value"

    def exists(self) -> bool:
        """Returns whether there is an object of this name, or any below it."""
        return self.is_file() or bool(list_files(self))

    def read_bytes(self) -> bytes:
        """Returns the object's bytes; raises FileNotFoundError when there is none."""
        with _service_errors(self):
            found = _store(self).read("").result()
        if found.state != "value":
            raise FileNotFoundError(f"no {self}")
        return found.value

    def read_text(self) -> str:
        """Returns the object's text, decoded as UTF-8."""
        return self.read_bytes().decode()

    def write_bytes(self, data: bytes) -> None:
        """Writes or replaces the object."""
        with _service_errors(self):
            _store(self).write("", data).result()


StoragePath = Path | BucketPath


def parse_path(text: str) -> StoragePath:
    """Returns the path that a user wrote: a path of this machine or a bucket's URL.

    Raises PipelineError when it is neither.
    """
    scheme = text[:5]
    if scheme not in DRIVERS:
        if "://" in text:
            raise PipelineError(f"{text} is neither a path nor a bucket; wanted a path, {' or '.join(DRIVERS)}...")
        return Path(text)
    bucket, _, prefix = text[5:].partition("/")
    if not bucket or not prefix.strip("/"):
        raise PipelineError(f"{text} names no prefix in a bucket; wanted {scheme}bucket/prefix")
    return BucketPath(text.rstrip("/"))


def kvstore(path: StoragePath) -> dict[str, Any]:
    """Returns tensorstore's specification of the key-value store at a path, as JSON."""
    if isinstance(path, Path):
        return {"driver": "file", "path": str(path)}
    scheme, (bucket, _, prefix) = path.url[:5], path.url[5:].partition("/")
    spec: dict[str, Any] = {"driver": DRIVERS[scheme], "bucket": bucket, "path": prefix}
    if scheme == "s3://":
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        spec |= {"endpoint": endpoint} if endpoint else {}
        spec |= {"aws_region": region} if region else {}
        if "AWS_ACCESS_KEY_ID" in os.environ:
            spec["aws_credentials"] = {"type": "environment"}  # and no look for files and machine roles
    return spec


@functools.cache
def tensorstore_context() -> "tensorstore.Context":
    """Returns what all opened stores share: connections, and how often a request is tried again."""
    import tensorstore

    return tensorstore.Context({"gcs_request_retries": RETRIES, "s3_request_retries": RETRIES})


def list_files(root: StoragePath) -> list[str]:
    """Returns the names of all files below a path, with `/` between their parts, sorted."""
    if isinstance(root, Path):
        return sorted(file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file())
    import tensorstore

    prefix = root.url[5:].partition("/")[2] + "/"
    with _service_errors(root):
        bucket = _store(BucketPath(root.url[: -len(prefix)]))
        keys = bucket.list(tensorstore.KvStore.KeyRange(prefix, prefix[:-1] + "0")).result()  # 0 comes behind /
    # services that only speak like Google's may list the whole bucket
    return sorted(key.decode().removeprefix(prefix) for key in keys if key.startswith(prefix.encode()))


def remove(path: StoragePath) -> None:
    """Removes a file or everything below a path; a path at which nothing exists is no error."""
    if isinstance(path, Path):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        return
    with _service_errors(path):
        objects = (path, *(path / name for name in list_files(path)))
        for removal in [_store(file).write("", None) for file in objects]:
            removal.result()


def sha256(file: StoragePath) -> str:
    """Returns the sha256 (hex) of a file's bytes."""
    if isinstance(file, BucketPath):
        return hashlib.sha256(file.read_bytes()).hexdigest()
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def file_record(file: StoragePath) -> dict[str, Any]:
    """Returns what a manifest records of a file: its size in bytes and its sha256."""
    if isinstance(file, BucketPath):
        return record_of_bytes(file.read_bytes())
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}


def record_of_bytes(data: bytes) -> dict[str, Any]:
    """Returns the record of a file whose bytes have been read."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """Returns how a file's record differs from the one written with it, or None; a record may lack its sha256."""
    if found["bytes"] != wanted["bytes"]:
        return f"{found['bytes']} bytes, written with {wanted['bytes']}"
    if found.get("sha256", wanted["sha256"]) != wanted["sha256"]:
        return CHANGED
    return None


def damaged_files(root: StoragePath, entries: Mapping[str, Mapping[str, Any]], *, verify: bool) -> list[str]:
    """Returns what is wrong with the files that `entries` records; only with `verify` are their bytes read."""
    if isinstance(root, BucketPath) and not verify:
        return _missing_or_short(root, entries)
    problems = ((name, _problem(root / name, wanted, verify)) for name, wanted in entries.items())
    return [f"{name}: {problem}" for name, problem in problems if problem is not None]


def _problem(file: StoragePath, wanted: Mapping[str, Any], verify: bool) -> str | None:
    try:
        found = {"bytes": file.stat().st_size} if isinstance(file, Path) and not verify else file_record(file)
    except (FileNotFoundError, IsADirectoryError):
        return "missing"
    return difference(found, wanted)


def _missing_or_short(root: BucketPath, entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Asks a bucket for the last byte of every file, because it reports no sizes."""
    problems, names = [], list(entries)
    with _service_errors(root):
        for start in range(0, len(names), AT_ONCE):
            some = names[start : start + AT_ONCE]
            ends = [slice(max(entries[name]["bytes"] - 1, 0), entries[name]["bytes"]) for name in some]
            reads = [_store(root / name).read("", byte_range=end) for name, end in zip(some, ends, strict=True)]
            for name, read in zip(some, reads, strict=True):
                try:
                    if read.result().state != "value":
                        problems.append(f"{name}: missing")
                except ValueError as error:
                    if "OUT_OF_RANGE" not in str(error):
                        raise
                    problems.append(f"{name}: shorter than the {entries[name]['bytes']} bytes written")
    return problems


def _store(path: BucketPath) -> "tensorstore.KvStore":
    spec = kvstore(path)
    prefix = spec.pop("path")
    return _bucket(json.dumps(spec)) + prefix


@functools.lru_cache(maxsize=8)  # opening a bucket asks where it is
def _bucket(spec: str) -> "tensorstore.KvStore":
    import tensorstore

    return tensorstore.KvStore.open(json.loads(spec), context=tensorstore_context()).result()


@contextlib.contextmanager
def _service_errors(path: BucketPath) -> Iterator[None]:
    """Turns what a bucket answers, or its silence, into one error."""
    try:
        yield
    except (ValueError, RuntimeError, OSError) as error:  # as tensorstore reports what services and networks say
        raise unreachable(path, error) from error


def is_unreachable(path: StoragePath, error: Exception) -> bool:
    """Returns whether an error of tensorstore came from a service or the network, and not from what is stored."""
    return isinstance(path, BucketPath) and any(text in str(error) for text in OF_A_SERVICE)


def unreachable(path: StoragePath, error: Exception) -> PipelineError:
    """Returns the error to raise for a bucket that does not answer, or refuses."""
    return PipelineError(
        f"{path} cannot be reached: {str(error).splitlines()[0][:300]}; check the network, the bucket's name and "
        "your credentials, then run the same command: it goes on from the last complete piece"
    )
