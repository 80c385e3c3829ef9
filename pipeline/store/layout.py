"""Describes what a teacher cache holds: arrays, names, sizes, format version."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from pipeline.artifacts import storage
from pipeline.artifacts.storage import StoragePath
from pipeline.store import feature_codec

CACHE_FORMAT = 2

SPLITS = ("train", "heldout")
NO_FEATURES = "none"  # how a cache stores features that the live target gives

HEADER, SHARD, ROWS = "store.json", "shard.json", "rows.json"

CHUNK_TOKENS = 256  # a sequence reads at most this in vain at either end

FILE_TOKENS = 4096  # of features: what is read to compare a sha256 before a sequence can be (118 MB for gpt-oss)

ROW_BYTES, HEADER_BYTES = 512, 8192  # generous: a row of rows.json is about 120 bytes

COPIES = 4  # files on their way to a bucket at once

MEND = "delete the cache's directory and run stage=teacher_cache again"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachedSequence:
    """Holds a prompt and the target's answer, token by token: its id, its channel, its features (bfloat16 [T, L * D]).

    `features` is None where none are stored or none were asked for.
    """

    token_ids: Int[np.ndarray, " T"]
    channels: UInt8[np.ndarray, " T"]
    prompt_tokens: int
    features: np.ndarray | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardRows:
    """Holds the sequences of a shard in order, column by column. `num_tokens` counts prompt and answer."""

    prompt_ids: list[str]
    efforts: list[str]
    finish_reasons: list[str]
    num_tokens: list[int]
    prompt_tokens: list[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheLayout:
    """How a cache stores the features of `num_tapped` layers: `stored` is bfloat16, int8 or none.

    `feature_size` is the width of all layers together (L * D). Both numbers are 0 where no features are stored.
    """

    stored: str
    feature_size: int
    num_tapped: int

    @property
    def token_bytes(self) -> int:
        """The bytes that a token takes: its id, its channel and its features."""
        return 4 + 1 + feature_codec.token_bytes(self.stored, self.feature_size, self.num_tapped)

    def arrays(self, num_tokens: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Returns the types and shapes of a shard's arrays, by name."""
        found: dict[str, tuple[str, tuple[int, ...]]] = {
            "tokens": ("int32", (num_tokens,)),
            "channels": ("uint8", (num_tokens,)),
        }
        if self.stored != NO_FEATURES:
            found["features"] = (self.stored, (num_tokens, self.feature_size))
        if self.stored == "int8":
            found["scales"] = ("float32", (num_tokens, self.num_tapped))
        return found


def shard_path(root: StoragePath, split: str, index: int) -> StoragePath:
    """Returns the path of shard `index` of a split."""
    return root / split / f"{index:05d}"


def estimated_bytes(num_tokens: int, num_sequences: int, num_shards: int, layout: CacheLayout) -> int:
    """Returns an upper bound of the bytes of shards: tokens, channels and features in full chunks, rows and headers."""
    stored = num_tokens + num_shards * CHUNK_TOKENS
    return stored * layout.token_bytes + num_sequences * ROW_BYTES + num_shards * HEADER_BYTES


def listed_files(num_shards: dict[str, int]) -> list[str]:
    """Returns the files that vouch for all others, which the manifest names: the header and every shard's."""
    shards = [f"{split}/{index:05d}/{SHARD}" for split, count in num_shards.items() for index in range(count)]
    return [HEADER, *shards]


def zarr_spec(path: StoragePath) -> dict[str, Any]:
    """Returns tensorstore's spec of the array at a path."""
    return {"driver": "zarr3", "kvstore": storage.kvstore(path)}
