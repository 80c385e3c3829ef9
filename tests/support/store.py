"""A teacher cache of random numbers, complete with its manifest, in any place and with features stored in any way."""

from pathlib import Path

import ml_dtypes
import numpy as np

from pipeline.artifacts import artifact
from pipeline.artifacts.artifact import Artifact, Parent
from pipeline.artifacts.storage import StoragePath
from pipeline.prompts.channels import Channel
from pipeline.store.layout import CacheLayout, ShardRows, listed_files, shard_path
from pipeline.store.writer import ShardContents, write_header, write_shard

KIND = "teacher_cache"
FEATURE_SIZE, NUM_TAPPED = 6, 2
LENGTHS = {"train": ([300, 5, 411], [2, 700]), "heldout": ([9],)}
NUM_SHARDS = {split: len(shards) for split, shards in LENGTHS.items()}


def layout(stored: str) -> CacheLayout:
    """With features of two layers, or with none."""
    if stored == "none":
        return CacheLayout(stored=stored, feature_size=0, num_tapped=0)
    return CacheLayout(stored=stored, feature_size=FEATURE_SIZE, num_tapped=NUM_TAPPED)


def sequences(split: str, shard: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Token ids, channels and features of each sequence of a shard."""
    random = np.random.default_rng([len(split), shard])
    return [
        (
            random.integers(0, 2**31, count, dtype=np.int32),
            random.integers(0, len(Channel), count, dtype=np.uint8),
            random.normal(size=(count, FEATURE_SIZE)).astype(ml_dtypes.bfloat16),
        )
        for count in LENGTHS[split][shard]
    ]


def write(
    root: StoragePath,
    split: str,
    shard: int,
    stored: str = "bfloat16",
    *,
    staging: Path | None = None,
    spoil: float = 0.0,
) -> None:
    """Write a shard; `spoil` takes the place of a feature of the second sequence's third token."""
    token_ids, channels, features = (np.concatenate(parts) for parts in zip(*sequences(split, shard), strict=True))
    if spoil:
        features[302, 4] = spoil
    lengths = LENGTHS[split][shard]
    rows = ShardRows(
        prompt_ids=[f"{split}-{shard}-{index}" for index in range(len(lengths))],
        efforts=["low"] * len(lengths),
        finish_reasons=["stop"] * len(lengths),
        num_tokens=list(lengths),
        prompt_tokens=[1] * len(lengths),
    )
    write_shard(
        shard_path(root, split, shard),
        ShardContents(
            rows=rows,
            token_ids=token_ids,
            channels=channels,
            features=None if stored == "none" else features,
        ),
        layout=layout(stored),
        fingerprint="f",
        report={"a": 1},
        staging=staging,
    )


def build(path: StoragePath, stored: str = "bfloat16", *, staging: Path | None = None, spoil: float = 0.0) -> Artifact:
    """Write all shards and seal; with `spoil`, in the first train shard."""
    root = artifact.scratch_of(path) if staging else artifact.open_scratch(path, resume=False)
    for split, shards in LENGTHS.items():
        for shard in range(len(shards)):
            spoiled = spoil if (split, shard) == ("train", 0) else 0.0
            write(root, split, shard, stored, staging=staging, spoil=spoiled)
    write_header(root, layout(stored), NUM_SHARDS)
    return artifact.seal(
        path,
        kind=KIND,
        key="0123456789ab",
        settings={"a": 1},
        parents={"target": Parent(key="ba9876543210", fingerprint="f" * 64)},
        contract={"b": 2},
        listed=listed_files(NUM_SHARDS),
    )
