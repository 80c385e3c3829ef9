"""The teacher cache on disk: one token stream and its features per shard, and the reader of both.

    store.json                      format, feature width, number of shards per split; written after all shards
    train/00000/tokens              int32 [tokens]            zarr3, sharded
    train/00000/features            bfloat16 [tokens, L * D]  zarr3, sharded: 256 tokens to a chunk, crc32c each
    train/00000/rows.json           where each sequence lies and where it comes from
    train/00000/shard.json          sha256 of the files above; written last
    heldout/00000/...

Everything is stored once per token, never per block: all anchors of a sequence read the same features. A
shard is built under another name and renamed, so it is complete or absent.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore
from jaxtyping import Int

from pipeline import artifacts
from pipeline.artifacts import PipelineError

FORMAT = 1
SPLITS = ("train", "heldout")
HEADER, SHARD, ROWS = "store.json", "shard.json", "rows.json"
CHUNK_TOKENS = 256  # what one sequence reads in vain is at most this at either end
BFLOAT16_EXPONENT = 0x7F80  # all ones: infinite or nan
ROW_BYTES, HEADER_BYTES = 512, 8192  # generous: a row of rows.json is about 120 bytes
MEND = "delete the cache's directory and run stage=teacher_cache again"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachedSequence:
    """A prompt and the target's answer: `features[p]` are those of `token_ids[p]`, bfloat16 [T, L * D]."""

    token_ids: Int[np.ndarray, " T"]
    prompt_tokens: int
    features: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """The sequences of a shard in order, column by column. `num_tokens` counts prompt and answer."""

    prompt_ids: list[str]
    efforts: list[str]
    finish_reasons: list[str]
    num_tokens: list[int]
    prompt_tokens: list[int]


def shard_path(root: Path, split: str, index: int) -> Path:
    """Where shard `index` of a split lives."""
    return root / split / f"{index:05d}"


def estimated_bytes(num_tokens: int, num_sequences: int, num_shards: int, feature_size: int) -> int:
    """Upper bound of what shards take on disk: int32 tokens, bfloat16 features, full chunks, rows and headers."""
    stored = num_tokens + num_shards * CHUNK_TOKENS
    return stored * (4 + 2 * feature_size) + num_sequences * ROW_BYTES + num_shards * HEADER_BYTES


def write_shard(
    path: Path,
    rows: Rows,
    token_ids: Int[np.ndarray, " tokens"],
    features: np.ndarray,
    *,
    fingerprint: str,
    report: dict[str, Any],
) -> None:
    """Write one shard so that it is complete or absent.

    `token_ids` [tokens] and `features` [tokens, L * D] (bfloat16) are all sequences end to end. `fingerprint`
    stands for everything that decides the shard's bytes; `report` is kept beside it, JSON values.
    """
    assert token_ids.shape == (sum(rows.num_tokens),)
    assert features.shape[:1] == token_ids.shape
    scratch = path.with_name(path.name + ".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    writes = [
        _create(scratch / "tokens", token_ids, "int32").write(token_ids),
        _create(scratch / "features", features, "bfloat16").write(features),
    ]
    for write in writes:
        write.result()
    artifacts.write_json(scratch / ROWS, dataclasses.asdict(rows))
    files = {
        str(file.relative_to(scratch)): {"bytes": file.stat().st_size, "sha256": artifacts.file_sha256(file)}
        for file in sorted(scratch.rglob("*"))
        if file.is_file()
    }
    header = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "num_sequences": len(rows.num_tokens),
        "num_tokens": len(token_ids),
        "feature_size": features.shape[1],
        "report": report,
        "files": files,
    }
    artifacts.write_json(scratch / SHARD, header)
    os.rename(scratch, path)
    artifacts.sync_directory(path.parent)


def read_report(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """The report of the complete, undamaged shard at `path` made under `fingerprint`; None for any other."""
    if not (path / SHARD).is_file():
        return None
    header = json.loads((path / SHARD).read_text())
    if header.get("format") != FORMAT or header["fingerprint"] != fingerprint:
        return None
    found = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    if found != {SHARD, *header["files"]} or _damage(path, header["files"]):
        return None
    return header["report"]


def write_header(root: Path, feature_size: int, num_shards: dict[str, int]) -> None:
    """Say what the store holds, when all its shards are written."""
    artifacts.write_json(
        root / HEADER, {"format": FORMAT, "feature_size": feature_size, "dtype": "bfloat16", "num_shards": num_shards}
    )


class CacheSplit:
    """One split of a teacher cache, sequences addressed 0..num_sequences-1 in the order of the prompts."""

    def __init__(self, shards: Sequence["_Shard"], feature_size: int) -> None:
        self._shards = list(shards)
        self._first = np.cumsum([0, *(len(shard.rows.num_tokens) for shard in shards)])
        self.feature_size = feature_size
        self.num_sequences = int(self._first[-1])
        self.num_tokens = np.array(self._column("num_tokens"), dtype=np.int64)
        self.prompt_tokens = np.array(self._column("prompt_tokens"), dtype=np.int64)
        self.prompt_ids: list[str] = self._column("prompt_ids")
        self.efforts: list[str] = self._column("efforts")
        self.finish_reasons: list[str] = self._column("finish_reasons")

    def read(self, indices: Sequence[int]) -> list[CachedSequence]:
        """The sequences named, in that order, read side by side.

        Raises PipelineError naming shard and row when bytes were changed or features are not finite, and
        IndexError for an index out of range.
        """
        places = [self._place(int(index)) for index in indices]
        reads = [(shard, row, shard.start_read(row)) for shard, row in places]
        return [shard.finish_read(row, read) for shard, row, read in reads]

    def _place(self, index: int) -> tuple["_Shard", int]:
        if not 0 <= index < self.num_sequences:
            raise IndexError(f"sequence {index} of {self.num_sequences}")
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        return self._shards[shard], index - int(self._first[shard])

    def _column(self, name: str) -> list[Any]:
        return [value for shard in self._shards for value in getattr(shard.rows, name)]


def open_split(directory: Path, split: str, *, verify: bool = True) -> CacheSplit:
    """Open "train" or "heldout" of the cache in `directory`.

    With `verify`, each shard's sha256s are compared when it is first read; each chunk's crc32c is in any
    case. Raises PipelineError when a shard is absent, damaged or of another format.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; wanted one of {SPLITS}")
    header = _read_json(directory / HEADER)
    if header["format"] != FORMAT:
        raise PipelineError(f"{directory} has format {header['format']}, this version reads {FORMAT}; {MEND}")
    paths = [shard_path(directory, split, index) for index in range(header["num_shards"][split])]
    absent = [path.name for path in paths if not (path / SHARD).is_file()]
    if absent:
        raise PipelineError(f"{directory / split} lacks the shards {', '.join(absent)}; {MEND}")
    feature_size = header["feature_size"]
    return CacheSplit([_Shard(path, feature_size, verify) for path in paths], feature_size)


class _Shard:
    def __init__(self, path: Path, feature_size: int, verify: bool) -> None:
        self.path = path
        self._files = _read_json(path / SHARD)["files"]
        self._unverified = verify
        self._require_undamaged([ROWS])
        self.rows = Rows(**_read_json(path / ROWS))
        self._offsets = np.cumsum([0, *self.rows.num_tokens])
        self._feature_size = feature_size
        self._arrays: tuple[tensorstore.TensorStore, tensorstore.TensorStore] | None = None

    def start_read(self, row: int) -> tuple[tensorstore.Future, tensorstore.Future]:
        tokens, features = self._opened()
        span = slice(int(self._offsets[row]), int(self._offsets[row + 1]))
        return tokens[span].read(), features[span].read()

    def finish_read(self, row: int, read: tuple[tensorstore.Future, tensorstore.Future]) -> CachedSequence:
        try:
            token_ids, features = (np.asarray(future.result()) for future in read)
        except (ValueError, OSError) as error:  # tensorstore reports damaged data as ValueError
            raise PipelineError(f"teacher cache shard {self.path}, row {row}: {error}; {MEND}") from error
        bad = np.flatnonzero(~is_finite(features).all(axis=1))
        if len(bad):
            raise PipelineError(
                f"teacher cache shard {self.path}, row {row} (prompt {self.rows.prompt_ids[row]}): features of "
                f"{len(bad)} tokens are not finite, the first at position {bad[0]}; {MEND}"
            )
        return CachedSequence(token_ids=token_ids, prompt_tokens=self.rows.prompt_tokens[row], features=features)

    def _opened(self) -> tuple[tensorstore.TensorStore, tensorstore.TensorStore]:
        if self._unverified:
            self._require_undamaged(self._files)
            self._unverified = False
        if self._arrays is None:
            num_tokens = int(self._offsets[-1])
            self._arrays = (
                self._open("tokens", "int32", (num_tokens,)),
                self._open("features", "bfloat16", (num_tokens, self._feature_size)),
            )
        return self._arrays

    def _open(self, name: str, dtype: str, shape: tuple[int, ...]) -> tensorstore.TensorStore:
        try:
            array = tensorstore.open(_kvstore(self.path / name), open=True, read=True).result()
        except (ValueError, OSError) as error:
            raise PipelineError(f"teacher cache shard {self.path}: {name} cannot be opened: {error}; {MEND}") from error
        if tuple(array.shape) != shape or array.dtype.name != dtype:
            raise PipelineError(
                f"teacher cache shard {self.path}: {name} is {array.dtype.name} {list(array.shape)}, wanted "
                f"{dtype} {list(shape)}; {MEND}"
            )
        return array

    def _require_undamaged(self, names: Iterable[str]) -> None:
        damage = _damage(self.path, {name: self._files[name] for name in names})
        if damage:
            raise PipelineError(f"teacher cache shard {self.path} is damaged ({'; '.join(damage)}); {MEND}")


def is_finite(features: np.ndarray) -> np.ndarray:
    """Which bfloat16 values are finite, by their bits: many times as fast as through float32."""
    return (features.view(np.uint16) & BFLOAT16_EXPONENT) != BFLOAT16_EXPONENT


def _damage(path: Path, files: dict[str, dict[str, Any]]) -> list[str]:
    damage = []
    for name, entry in files.items():
        if not (path / name).is_file():
            damage.append(f"{name}: missing")
        elif artifacts.file_sha256(path / name) != entry["sha256"]:
            damage.append(f"{name}: sha256 differs from the one written")
    return damage


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise PipelineError(f"teacher cache: cannot read {path} ({error}); {MEND}") from error


def _kvstore(path: Path) -> dict[str, Any]:
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}


def _create(path: Path, array: np.ndarray, dtype: str) -> tensorstore.TensorStore:
    assert array.dtype == np.dtype(getattr(ml_dtypes, dtype, dtype)), (array.dtype, dtype)
    chunk = [CHUNK_TOKENS, *array.shape[1:]]
    file = [-(-len(array) // CHUNK_TOKENS) * CHUNK_TOKENS, *array.shape[1:]]  # all chunks in one file
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    sharding = {"chunk_shape": chunk, "codecs": codecs, "index_codecs": codecs}
    metadata = {
        "shape": list(array.shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": file}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
    return tensorstore.open(_kvstore(path) | {"metadata": metadata}, create=True).result()
