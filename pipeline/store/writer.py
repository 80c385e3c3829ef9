"""Writes shards that are complete or absent, on a disk or in a bucket."""

import dataclasses
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore
from jaxtyping import Int, UInt8

from pipeline.artifacts import storage
from pipeline.artifacts.files import sync_directory, write_json
from pipeline.artifacts.storage import BucketPath, StoragePath
from pipeline.errors import PipelineError
from pipeline.store import feature_codec
from pipeline.store.layout import (
    CACHE_FORMAT,
    CHUNK_TOKENS,
    COPIES,
    FILE_TOKENS,
    HEADER,
    ROWS,
    SHARD,
    CacheLayout,
    ShardRows,
    zarr_spec,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardContents:
    """Holds the sequences of a shard: `token_ids`, `channels` [tokens] and `features` [tokens, L * D] end to end.

    Features are bfloat16; None where none are stored.
    """

    rows: ShardRows
    token_ids: Int[np.ndarray, " tokens"]
    channels: UInt8[np.ndarray, " tokens"]
    features: np.ndarray | None


def write_shard(
    path: StoragePath,
    contents: ShardContents,
    *,
    layout: CacheLayout,
    fingerprint: str,
    report: dict[str, Any],
    staging: Path | None = None,
) -> dict[str, Any]:
    """Writes one shard so that it is complete or absent; returns the report with the `bytes` of its files.

    `fingerprint` stands for everything that decides the shard's bytes; `report` is kept beside it, JSON values. For a
    bucket the shard is built in `staging`, copied and read back; PipelineError names a file that came back different.
    """
    rows, token_ids, channels = contents.rows, contents.token_ids, contents.channels
    assert token_ids.shape == channels.shape == (sum(rows.num_tokens),)
    scratch = path.with_name(path.name + ".partial") if isinstance(path, Path) else staging
    assert scratch is not None, "a shard for a bucket has a staging directory"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    arrays = {"tokens": token_ids, "channels": channels} | feature_codec.encode(
        contents.features, layout.stored, layout.num_tapped
    )
    wanted = layout.arrays(len(token_ids))
    assert {name: array.shape for name, array in arrays.items()} == {name: shape for name, (_, shape) in wanted.items()}
    writes = [_create(scratch / name, array, wanted[name][0]).write(array) for name, array in arrays.items()]
    for write in writes:
        write.result()
    write_json(scratch / ROWS, dataclasses.asdict(rows))
    files = {name: storage.file_record(scratch / name) for name in storage.list_files(scratch)}
    report = {**report, "bytes": sum(entry["bytes"] for entry in files.values())}
    header = {
        "format": CACHE_FORMAT,
        "fingerprint": fingerprint,
        "num_sequences": len(rows.num_tokens),
        "num_tokens": len(token_ids),
        "layout": dataclasses.asdict(layout),
        "report": report,
        "files": files,
    }
    write_json(scratch / SHARD, header)
    if isinstance(path, BucketPath):
        _copy(scratch, path, files)
        shutil.rmtree(scratch)
    else:
        os.rename(scratch, path)
        sync_directory(path.parent)
    return report


def _copy(built: Path, path: BucketPath, files: dict[str, dict[str, Any]]) -> None:
    """Copies a shard to a bucket, its header last; every file is read back."""

    def copy(name: str) -> list[str]:
        (path / name).write_bytes((built / name).read_bytes())
        return storage.damaged_files(path, {name: files[name]}, verify=True)

    with ThreadPoolExecutor(COPIES) as workers:
        damage = [problem for problems in workers.map(copy, files) for problem in problems]
    if damage:
        raise PipelineError(
            f"{path} did not take what was written to it ({'; '.join(damage)}); run the same command again, and look "
            "for what changes data on the way if it stays so"
        )
    (path / SHARD).write_bytes((built / SHARD).read_bytes())


def read_report(path: StoragePath, fingerprint: str, *, verify: bool = True) -> dict[str, Any] | None:
    """Returns the report of the complete shard at `path` written under `fingerprint`; None for any other.

    With `verify`, None for a damaged one too; what was copied to a bucket was read back at that time.
    """
    try:
        header = json.loads((path / SHARD).read_text())
    except (FileNotFoundError, ValueError):
        return None
    if header.get("format") != CACHE_FORMAT or header["fingerprint"] != fingerprint:
        return None
    if verify and set(storage.list_files(path)) != {SHARD, *header["files"]}:
        return None
    if verify and isinstance(path, Path) and storage.damaged_files(path, header["files"], verify=True):
        return None
    return header["report"]


def write_header(root: StoragePath, layout: CacheLayout, num_shards: dict[str, int]) -> None:
    """Writes what the store holds, when all its shards are written."""
    write_json(root / HEADER, {"format": CACHE_FORMAT, "layout": dataclasses.asdict(layout), "num_shards": num_shards})


def _create(path: Path, array: np.ndarray, dtype: str) -> tensorstore.TensorStore:
    assert array.dtype == np.dtype(getattr(ml_dtypes, dtype, dtype)), (array.dtype, dtype)
    chunk = [CHUNK_TOKENS, *array.shape[1:]]
    whole = max(-(-len(array) // CHUNK_TOKENS), 1) * CHUNK_TOKENS  # no answer at all is a shard too
    file = [min(whole, FILE_TOKENS) if path.name == "features" else whole, *array.shape[1:]]
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    sharding = {"chunk_shape": chunk, "codecs": codecs, "index_codecs": codecs}
    metadata = {
        "shape": list(array.shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": file}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
    return tensorstore.open(zarr_spec(path) | {"metadata": metadata}, create=True).result()
