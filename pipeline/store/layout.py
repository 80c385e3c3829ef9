"""The teacher cache on disk or in a bucket: token streams with their features in shards, and the reader of both.

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

import dataclasses
import json
import os
import shutil
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore
from jaxtyping import Int, UInt8

from pipeline import artifacts, places
from pipeline.artifacts import PipelineError
from pipeline.places import BucketPath, Place
from pipeline.teacher_cache import features as codec

FORMAT = 2
SPLITS = ("train", "heldout")
HEADER, SHARD, ROWS = "store.json", "shard.json", "rows.json"
CHUNK_TOKENS = 256  # what one sequence reads in vain is at most this at either end
FILE_TOKENS = 4096  # of features: what is read to compare a sha256 before a sequence can be (118 MB for gpt-oss)
ROW_BYTES, HEADER_BYTES = 512, 8192  # generous: a row of rows.json is about 120 bytes
COPIES = 4  # files on their way to a bucket at once
MEND = "delete the cache's directory and run stage=teacher_cache again"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachedSequence:
    """A prompt and the target's answer, token by token: its id, its channel, its features (bfloat16 [T, L * D]).

    `features` is None where none are stored or none were asked for.
    """

    token_ids: Int[np.ndarray, " T"]
    channels: UInt8[np.ndarray, " T"]
    prompt_tokens: int
    features: np.ndarray | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """The sequences of a shard in order, column by column. `num_tokens` counts prompt and answer."""

    prompt_ids: list[str]
    efforts: list[str]
    finish_reasons: list[str]
    num_tokens: list[int]
    prompt_tokens: list[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How a cache keeps features: `stored` as codec.KINDS has it, of `num_tapped` layers, `feature_size` wide (L * D).

    Both numbers are 0 where none are stored.
    """

    stored: str
    feature_size: int
    num_tapped: int

    @property
    def token_bytes(self) -> int:
        """What a token takes: its id, its channel and its features."""
        return 4 + 1 + codec.token_bytes(self.stored, self.feature_size, self.num_tapped)

    def arrays(self, num_tokens: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The arrays of a shard: their types and shapes."""
        found: dict[str, tuple[str, tuple[int, ...]]] = {
            "tokens": ("int32", (num_tokens,)),
            "channels": ("uint8", (num_tokens,)),
        }
        if self.stored != "none":
            found["features"] = (self.stored, (num_tokens, self.feature_size))
        if self.stored == "int8":
            found["scales"] = ("float32", (num_tokens, self.num_tapped))
        return found


def shard_path(root: Place, split: str, index: int) -> Place:
    """Where shard `index` of a split lives."""
    return root / split / f"{index:05d}"


def estimated_bytes(num_tokens: int, num_sequences: int, num_shards: int, layout: Layout) -> int:
    """Upper bound of what shards take: tokens, channels and features in full chunks, rows and headers."""
    stored = num_tokens + num_shards * CHUNK_TOKENS
    return stored * layout.token_bytes + num_sequences * ROW_BYTES + num_shards * HEADER_BYTES


def write_shard(
    path: Place,
    rows: Rows,
    token_ids: Int[np.ndarray, " tokens"],
    channels: UInt8[np.ndarray, " tokens"],
    features: np.ndarray | None,
    *,
    layout: Layout,
    fingerprint: str,
    report: dict[str, Any],
    staging: Path | None = None,
) -> dict[str, Any]:
    """Write one shard so that it is complete or absent; returns the report with the `bytes` of its files.

    `token_ids`, `channels` [tokens] and `features` [tokens, L * D] (bfloat16) are all sequences end to end.
    `fingerprint` stands for everything that decides the shard's bytes; `report` is kept beside it, JSON values. For a
    bucket the shard is built in `staging`, copied and read back; PipelineError names a file that came back different.
    """
    assert token_ids.shape == channels.shape == (sum(rows.num_tokens),)
    scratch = path.with_name(path.name + ".partial") if isinstance(path, Path) else staging
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    arrays = {"tokens": token_ids, "channels": channels} | codec.encode(features, layout.stored, layout.num_tapped)
    wanted = layout.arrays(len(token_ids))
    assert {name: array.shape for name, array in arrays.items()} == {name: shape for name, (_, shape) in wanted.items()}
    writes = [_create(scratch / name, array, wanted[name][0]).write(array) for name, array in arrays.items()]
    for write in writes:
        write.result()
    artifacts.write_json(scratch / ROWS, dataclasses.asdict(rows))
    files = {name: places.entry(scratch / name) for name in places.files(scratch)}
    report = {**report, "bytes": sum(entry["bytes"] for entry in files.values())}
    header = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "num_sequences": len(rows.num_tokens),
        "num_tokens": len(token_ids),
        "layout": dataclasses.asdict(layout),
        "report": report,
        "files": files,
    }
    artifacts.write_json(scratch / SHARD, header)
    if isinstance(path, BucketPath):
        _copy(scratch, path, files)
        shutil.rmtree(scratch)
    else:
        os.rename(scratch, path)
        artifacts.sync_directory(path.parent)
    return report


def _copy(built: Path, path: BucketPath, files: dict[str, dict[str, Any]]) -> None:
    """Copy a shard to a bucket, its header last; every file is read back."""

    def copy(name: str) -> list[str]:
        (path / name).write_bytes((built / name).read_bytes())
        return places.damage(path, {name: files[name]}, verify=True)

    with ThreadPoolExecutor(COPIES) as workers:
        damage = [problem for problems in workers.map(copy, files) for problem in problems]
    if damage:
        raise PipelineError(
            f"{path} did not take what was written to it ({'; '.join(damage)}); run the same command again, and look "
            "for what changes data on the way if it stays so"
        )
    (path / SHARD).write_bytes((built / SHARD).read_bytes())


def read_report(path: Place, fingerprint: str, *, verify: bool = True) -> dict[str, Any] | None:
    """The report of the complete shard at `path` made under `fingerprint`; None for any other.

    With `verify` one that is damaged is none either; what was copied to a bucket was read back when it was.
    """
    try:
        header = json.loads((path / SHARD).read_text())
    except (FileNotFoundError, ValueError):
        return None
    if header.get("format") != FORMAT or header["fingerprint"] != fingerprint:
        return None
    if verify and set(places.files(path)) != {SHARD, *header["files"]}:
        return None
    if verify and isinstance(path, Path) and places.damage(path, header["files"], verify=True):
        return None
    return header["report"]


def write_header(root: Place, layout: Layout, num_shards: dict[str, int]) -> None:
    """Say what the store holds, when all its shards are written."""
    artifacts.write_json(
        root / HEADER, {"format": FORMAT, "layout": dataclasses.asdict(layout), "num_shards": num_shards}
    )


def listed(num_shards: dict[str, int]) -> list[str]:
    """The files of a store that vouch for all others: its header and every shard's, as the manifest names them."""
    shards = [f"{split}/{index:05d}/{SHARD}" for split, count in num_shards.items() for index in range(count)]
    return [HEADER, *shards]


class CacheSplit:
    """One split of a teacher cache, sequences addressed 0..num_sequences-1 in the order of the prompts."""

    def __init__(self, shards: Sequence["_Shard"], layout: Layout) -> None:
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
        """The sequences named, in that order, read side by side; without `features` tokens and channels alone.

        Several threads may read at once. Raises PipelineError naming shard and row when bytes were changed or features
        are not finite, and IndexError for an index out of range.
        """
        found = [self._place(int(index)) for index in indices]
        reads = [(shard, row, shard.start_read(row, features)) for shard, row in found]
        return [shard.finish_read(row, read) for shard, row, read in reads]

    def where(self, index: int) -> str:
        """Shard and row of a sequence, for people."""
        shard, row = self._place(index)
        return f"{shard.path}, row {row}"

    def _place(self, index: int) -> tuple["_Shard", int]:
        if not 0 <= index < self.num_sequences:
            raise IndexError(f"sequence {index} of {self.num_sequences}")
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        return self._shards[shard], index - int(self._first[shard])

    def _column(self, name: str) -> list[Any]:
        return [value for shard in self._shards for value in getattr(shard.rows, name)]


def open_split(root: Place, split: str, *, verify: bool = True) -> CacheSplit:
    """Open "train" or "heldout" of the cache at `root`.

    Headers are compared with the manifest, where there is one. With `verify`, every file's sha256 is compared when it
    is first read from; each chunk's crc32c is in any case. Raises PipelineError when a shard is absent, damaged or of
    another format.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; wanted one of {SPLITS}")
    files = artifacts.read_manifest(root)["files"] if artifacts.exists(root) else {}
    header = _read_json(root, HEADER, files.get(HEADER))
    if header["format"] != FORMAT:
        raise PipelineError(f"{root} has format {header['format']}, this version reads {FORMAT}; {MEND}")
    layout = Layout(**header["layout"])
    names = [f"{split}/{index:05d}/{SHARD}" for index in range(header["num_shards"][split])]
    paths = [shard_path(root, split, index) for index in range(header["num_shards"][split])]
    with ThreadPoolExecutor(places.AT_ONCE) as workers:
        absent = [path.name for path, there in zip(paths, workers.map(_has_header, paths), strict=True) if not there]
        if absent:
            raise PipelineError(f"{root / split} lacks the shards {', '.join(absent)}; {MEND}")
        headers = workers.map(lambda name: _read_json(root, name, files.get(name)), names)
        shards = workers.map(lambda path, header: _Shard(path, header["files"], layout, verify), paths, headers)
        return CacheSplit(list(shards), layout)


def _has_header(path: Place) -> bool:
    return (path / SHARD).is_file()


class _Shard:
    def __init__(self, path: Place, files: dict[str, dict[str, Any]], layout: Layout, verify: bool) -> None:
        self.path = path
        self._layout = layout
        self._files = files
        self._require(places.damage(path, files, verify=False) if isinstance(path, Path) else [])
        self._unverified = set(files) if verify else set()
        self.rows = Rows(**_read_json(path, ROWS, files[ROWS]))
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
        bad = np.flatnonzero(~codec.is_finite(arrays))
        if len(bad):
            raise PipelineError(
                f"teacher cache shard {self.path}, row {row} (prompt {self.rows.prompt_ids[row]}): features of "
                f"{len(bad)} tokens are not finite, the first at position {bad[0]}; {MEND}"
            )
        return CachedSequence(
            token_ids=token_ids,
            channels=channels,
            prompt_tokens=self.rows.prompt_tokens[row],
            features=codec.decode(arrays),
        )

    def _open(self, name: str) -> tensorstore.TensorStore:
        dtype, shape = self._layout.arrays(int(self._offsets[-1]))[name]
        try:
            spec = _zarr(self.path / name)
            array = tensorstore.open(spec, open=True, read=True, context=places.context()).result()
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
            self._require(places.damage(self.path, {name: self._files[name]}, verify=True))
            self._unverified.remove(name)

    def _require(self, damage: list[str]) -> None:
        if damage:
            raise PipelineError(f"teacher cache shard {self.path} is damaged ({'; '.join(damage)}); {MEND}")


def _failure(path: Place, what: str, error: Exception) -> PipelineError:
    if places.is_unreachable(path, error):
        return places.unreachable(path, error)
    return PipelineError(f"teacher cache shard {path}, {what}: {error}; {MEND}")


def _files_of(name: str, first: int, end: int) -> list[str]:
    """The files of an array that hold the tokens first..end-1."""
    if name == "features":
        return [f"features/c/{index}/0" for index in range(first // FILE_TOKENS, (end - 1) // FILE_TOKENS + 1)]
    return [f"{name}/c/0", f"{name}/c/0/0"]


def _read_json(root: Place, name: str, entry: dict[str, Any] | None) -> Any:
    """A JSON file, read once and compared with its `entry`, where one is known."""
    try:
        data = (root / name).read_bytes()
        problem = None if entry is None else places.difference(places.entry_of(data), entry)
        if problem is not None:
            raise PipelineError(f"the teacher cache at {root} is damaged ({name}: {problem}); {MEND}")
        return json.loads(data)
    except (OSError, ValueError) as error:
        raise PipelineError(f"teacher cache: cannot read {root / name} ({error}); {MEND}") from error


def _zarr(path: Place) -> dict[str, Any]:
    return {"driver": "zarr3", "kvstore": places.kvstore(path)}


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
    return tensorstore.open(_zarr(path) | {"metadata": metadata}, create=True).result()
