"""Reads a teacher cache on disk or in a bucket: token streams with their features, in shards.

    store.json                      format, features, number of shards per split; written after all shards
    train/00000/tokens              int32 [tokens]            zarr3, sharded: 256 tokens to a chunk, crc32c each
    train/00000/channels            uint8 [tokens]            pipeline.prompts.channels.Channel
    train/00000/features            bfloat16 [tokens, L * D], or int8; in files of 4096 tokens
    train/00000/scales              float32 [tokens, L]       of int8 features alone
    train/00000/rows.json           where each sequence lies and where it comes from
    train/00000/shard.json          sha256 of the files above; written last
    heldout/00000/...

Everything is stored once per token, never per block: all anchors of a sequence read the same features. A
shard is built under another name and renamed, or copied to a bucket with shard.json last: it is complete or absent.
"""

import json
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from pipeline.artifacts import artifact, storage
from pipeline.artifacts.storage import StoragePath
from pipeline.errors import PipelineError
from pipeline.store import feature_codec
from pipeline.store.layout import (
    CACHE_FORMAT,
    FILE_TOKENS,
    HEADER,
    MEND,
    ROWS,
    SHARD,
    SPLITS,
    CachedSequence,
    CacheLayout,
    ShardRows,
    shard_path,
    zarr_spec,
)


class CacheSplit:
    """Reads one split of a teacher cache, sequences addressed 0..num_sequences-1 in the order of the prompts."""

    def __init__(self, shards: Sequence["_Shard"], layout: CacheLayout) -> None:
        self._shards = list(shards)
        self._first = np.cumsum([0, *(len(shard.rows.num_tokens) for shard in shards)])
        self.layout = layout
        self.feature_size = layout.feature_size
        self.num_sequences = int(self._first[-1])
        self.num_tokens = np.array(self._column("num_tokens"), dtype=np.int64)
        self.prompt_tokens = np.array(self._column("prompt_tokens"), dtype=np.int64)
        self.prompt_ids: list[str] = self._column("prompt_ids")
        self.efforts: list[str] = self._column("efforts")
        self.finish_reasons: list[str] = self._column("finish_reasons")

    def read(self, indices: Sequence[int], *, features: bool = True) -> list[CachedSequence]:
        """Returns the sequences of these indices, read side by side; without `features` tokens and channels alone.

        Several threads may read at once. Raises PipelineError naming shard and row when bytes were changed or features
        are not finite, and IndexError for an index out of range.
        """
        found = [self._shard_and_row(int(index)) for index in indices]
        reads = [(shard, row, shard.start_read(row, features)) for shard, row in found]
        return [shard.finish_read(row, read) for shard, row, read in reads]

    def where(self, index: int) -> str:
        """Returns shard and row of a sequence, for people."""
        shard, row = self._shard_and_row(index)
        return f"{shard.path}, row {row}"

    def _shard_and_row(self, index: int) -> tuple["_Shard", int]:
        if not 0 <= index < self.num_sequences:
            raise IndexError(f"sequence {index} of {self.num_sequences}")
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        return self._shards[shard], index - int(self._first[shard])

    def _column(self, name: str) -> list[Any]:
        return [value for shard in self._shards for value in getattr(shard.rows, name)]


def open_split(root: StoragePath, split: str, *, verify: bool = True) -> CacheSplit:
    """Opens "train" or "heldout" of the cache at `root`.

    Headers are compared with the manifest, where there is one. With `verify`, every file's sha256 is compared when it
    is first read from; each chunk's crc32c is in any case. Raises PipelineError when a shard is absent, damaged or of
    another format.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; wanted one of {SPLITS}")
    files = artifact.read_manifest(root)["files"] if artifact.exists(root) else {}
    header = _read_json(root, HEADER, files.get(HEADER))
    if header["format"] != CACHE_FORMAT:
        raise PipelineError(f"{root} has format {header['format']}, this version reads {CACHE_FORMAT}; {MEND}")
    layout = CacheLayout(**header["layout"])
    names = [f"{split}/{index:05d}/{SHARD}" for index in range(header["num_shards"][split])]
    paths = [shard_path(root, split, index) for index in range(header["num_shards"][split])]
    with ThreadPoolExecutor(storage.AT_ONCE) as workers:
        absent = [path.name for path, there in zip(paths, workers.map(_has_header, paths), strict=True) if not there]
        if absent:
            raise PipelineError(f"{root / split} lacks the shards {', '.join(absent)}; {MEND}")
        headers = workers.map(lambda name: _read_json(root, name, files.get(name)), names)
        shards = workers.map(lambda path, header: _Shard(path, header["files"], layout, verify), paths, headers)
        return CacheSplit(list(shards), layout)


def _has_header(path: StoragePath) -> bool:
    return (path / SHARD).is_file()


class _Shard:
    def __init__(self, path: StoragePath, files: dict[str, dict[str, Any]], layout: CacheLayout, verify: bool) -> None:
        self.path = path
        self._layout = layout
        self._files = files
        self._require(storage.damaged_files(path, files, verify=False) if isinstance(path, Path) else [])
        self._unverified = set(files) if verify else set()
        self.rows = ShardRows(**_read_json(path, ROWS, files[ROWS]))
        self._offsets = np.cumsum([0, *self.rows.num_tokens])
        self._arrays: dict[str, tensorstore.TensorStore] = {}
        self._lock = threading.Lock()  # one thread opens and compares, the others wait for it

    def start_read(self, row: int, with_features: bool) -> dict[str, tensorstore.Future]:
        first, end = int(self._offsets[row]), int(self._offsets[row + 1])
        wanted = [name for name in self._layout.arrays(0) if with_features or name in ("tokens", "channels")]
        with self._lock:
            for name in wanted:
                if name not in self._arrays:
                    self._verify([f"{name}/zarr.json"])
                    self._arrays[name] = self._open(name)
                self._verify(_files_of(name, first, end))
        return {name: self._arrays[name][first:end].read() for name in wanted}

    def finish_read(self, row: int, reads: dict[str, tensorstore.Future]) -> CachedSequence:
        try:
            arrays = {name: np.asarray(read.result()) for name, read in reads.items()}
        except (ValueError, OSError) as error:  # tensorstore reports damaged data as ValueError
            raise _failure(self.path, f"row {row}", error) from error
        token_ids, channels = arrays.pop("tokens"), arrays.pop("channels")
        bad = np.flatnonzero(~feature_codec.is_finite(arrays))
        if len(bad):
            raise PipelineError(
                f"teacher cache shard {self.path}, row {row} (prompt {self.rows.prompt_ids[row]}): features of "
                f"{len(bad)} tokens are not finite, the first at position {bad[0]}; {MEND}"
            )
        return CachedSequence(
            token_ids=token_ids,
            channels=channels,
            prompt_tokens=self.rows.prompt_tokens[row],
            features=feature_codec.decode(arrays),
        )

    def _open(self, name: str) -> tensorstore.TensorStore:
        dtype, shape = self._layout.arrays(int(self._offsets[-1]))[name]
        try:
            spec = zarr_spec(self.path / name)
            array = tensorstore.open(spec, open=True, read=True, context=storage.tensorstore_context()).result()
        except (ValueError, OSError) as error:
            raise _failure(self.path, f"{name} cannot be opened", error) from error
        if tuple(array.shape) != shape or array.dtype.name != dtype:
            raise PipelineError(
                f"teacher cache shard {self.path}: {name} is {array.dtype.name} {list(array.shape)}, wanted "
                f"{dtype} {list(shape)}; {MEND}"
            )
        return array

    def _verify(self, names: Iterable[str]) -> None:
        for name in self._unverified.intersection(names):
            self._require(storage.damaged_files(self.path, {name: self._files[name]}, verify=True))
            self._unverified.remove(name)

    def _require(self, damage: list[str]) -> None:
        if damage:
            raise PipelineError(f"teacher cache shard {self.path} is damaged ({'; '.join(damage)}); {MEND}")


def _failure(path: StoragePath, what: str, error: Exception) -> PipelineError:
    if storage.is_unreachable(path, error):
        return storage.unreachable(path, error)
    return PipelineError(f"teacher cache shard {path}, {what}: {error}; {MEND}")


def _files_of(name: str, first: int, end: int) -> list[str]:
    """Returns the files of an array that hold the tokens first..end-1."""
    if name == "features":
        return [f"features/c/{index}/0" for index in range(first // FILE_TOKENS, (end - 1) // FILE_TOKENS + 1)]
    return [f"{name}/c/0", f"{name}/c/0/0"]


def _read_json(root: StoragePath, name: str, entry: dict[str, Any] | None) -> Any:
    """Reads a JSON file once and compares it with its `entry`, where one is known."""
    try:
        data = (root / name).read_bytes()
        problem = None if entry is None else storage.difference(storage.record_of_bytes(data), entry)
        if problem is not None:
            raise PipelineError(f"the teacher cache at {root} is damaged ({name}: {problem}); {MEND}")
        return json.loads(data)
    except (OSError, ValueError) as error:
        raise PipelineError(f"teacher cache: cannot read {root / name} ({error}); {MEND}") from error
