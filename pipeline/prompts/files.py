"""Finds prompt files and reads their rows: JSON lines, a JSON array or parquet, plain or compressed; and datasets."""

import contextlib
import functools
import gzip
import io
import json
import logging
import os
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError

log = logging.getLogger("pipeline")

Rows = Iterator[tuple[str, Any]]  # where each is (`line 3`), and its JSON value or the error of a line that is none

STANDARD_INPUT = Path("-")
KEPT_INPUT = "PIPELINE_STANDARD_INPUT"  # environment variable: the file that `all` keeps its standard input in
SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")  # of the files that are read in a directory
COMPRESSED = (".gz", ".zst")
GZIP, ZSTD, PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"  # what such files begin with, whatever their names
SAVED = ("dataset_dict.json", "state.json")  # what `datasets` writes beside saved splits, and in one
FILE_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def prompt_files(wanted: str) -> list[Path]:
    """Returns the files of `prompts.path`: one, those of a directory or a pattern, sorted; `-` stays as it is.

    Raises PipelineError when there is none.
    """
    path = Path(wanted)
    if path == STANDARD_INPUT or path.is_file():
        return [path]
    if path.is_dir():
        names = tuple(suffix + more for suffix in SUFFIXES for more in ("", *COMPRESSED))
        found = sorted(file for file in path.rglob("*") if file.is_file() and file.name.lower().endswith(names))
        if not found:
            raise PipelineError(f"prompts.path is {path}, a directory without a file that ends in {', '.join(names)}")
        return found
    found = sorted(file for file in Path(path.anchor).glob(str(path.relative_to(path.anchor))) if file.is_file())
    if not found:
        raise PipelineError(f"prompts.path is {path}, which is no file; give a JSONL file of prompts")
    return found


@functools.cache  # it can be read once
def standard_input() -> bytes:
    """Returns all of the standard input; a stage of `all` finds it in the file that its parent keeps."""
    if KEPT_INPUT in os.environ:
        return Path(os.environ[KEPT_INPUT]).read_bytes()
    if sys.stdin is None or sys.stdin.isatty():
        raise PipelineError("prompts.path is -, and nothing is piped in; write it as `... < prompts.jsonl`")
    return sys.stdin.buffer.read()


@contextlib.contextmanager
def kept_standard_input() -> Iterator[None]:
    """Keeps the standard input in a file for the processes that are started meanwhile."""
    with tempfile.NamedTemporaryFile(prefix="prompts-") as file:
        file.write(standard_input())
        file.flush()
        os.environ[KEPT_INPUT] = file.name
        try:
            yield
        finally:
            del os.environ[KEPT_INPUT]


def file_rows(path: Path) -> Rows:
    """Returns the rows of a file in UTF-8, with or without a byte order mark; raises PipelineError."""
    try:
        data = _decompressed(standard_input() if path == STANDARD_INPUT else path.read_bytes())
        if data.startswith(PARQUET):
            return _parquet_rows(data)
        text = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig").read()
    except (OSError, EOFError, zlib.error, ValueError) as error:  # UnicodeDecodeError and pyarrow's are ValueErrors
        raise PipelineError(f"cannot read prompts from {path} ({error}); give a JSONL file in UTF-8") from error
    return _json_rows(text, path)


def _decompressed(data: bytes) -> bytes:
    if data.startswith(GZIP):
        return gzip.decompress(data)
    return _unzstd(data) if data.startswith(ZSTD) else data


def _unzstd(data: bytes) -> bytes:
    import zstandard  # imported late: most runs do without it

    parts = []
    while data:  # files that were joined have several frames
        frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            parts.append(frame.decompress(data))
        except zstandard.ZstdError as error:
            raise ValueError(str(error)) from error
        if not frame.eof:
            raise EOFError("it ends inside of a zstd frame")
        data = frame.unused_data
    return b"".join(parts)


def _parquet_rows(data: bytes) -> Rows:
    import pyarrow.parquet  # imported late: it takes half a second and most runs do without it

    table = pyarrow.parquet.read_table(pyarrow.BufferReader(data))
    return ((f"row {index}", without_nulls(row)) for index, row in enumerate(table.to_pylist()))


def _json_rows(text: str, path: Path) -> Rows:
    array = _array(text, path)
    if array is not None:
        return ((f"item {number}", row) for number, row in enumerate(array, start=1))
    lines = enumerate(text.split("\n"), start=1)
    return ((f"line {number}", _parsed(line)) for number, line in lines if line.strip())


def _array(text: str, path: Path) -> list[Any] | None:
    """Returns the array that a whole text is; None where it is lines, of which each may be a list."""
    if not text.lstrip().startswith("["):
        return None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return None
        raise PipelineError(
            f"{path} begins as a JSON array and is not JSON ({error.msg} at line {error.lineno} column {error.colno}); "
            "mend it, or give one object a line"
        ) from error


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return error


def without_nulls(value: Any) -> Any:
    """Returns a value without nulls in its objects: tables give every object the keys of all rows."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def load_dataset(name: str, split: str, subset: str | None, revision: str | None) -> Any:
    """Returns a split of a dataset on the hub or on disk; raises PipelineError when it cannot be loaded."""
    import datasets  # imported late: it takes a second and most runs do without it

    path = Path(name)
    try:
        if path.is_file():
            suffix = Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix
            if suffix not in FILE_FORMATS:
                raise PipelineError(f"{path} ends in {suffix!r}; wanted one of {', '.join(FILE_FORMATS)}")
            return datasets.load_dataset(FILE_FORMATS[suffix], data_files=str(path), split=split)
        if any((path / file).is_file() for file in SAVED):
            return _saved(datasets.load_from_disk(name), split)
        log.info("prompts: reading %s from the hub, or from its cache", name)
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs each of its attempts, twice
        return datasets.load_dataset(name, subset, split=split, revision=revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise PipelineError(
            f"cannot load dataset {name}, split {split} ({type(error).__name__}: {error}); check the "
            "name, the split and the network, or give a local directory or file"
        ) from error


def _saved(loaded: Any, split: str) -> Any:
    """Returns the split of what `save_to_disk` wrote, which may be a single split without a name."""
    if not isinstance(loaded, dict):
        return loaded
    if split not in loaded:
        raise ValueError(f"it has the splits {', '.join(loaded)}")
    return loaded[split]
