"""The cache on disk: what is written comes back exactly, what was changed is named."""

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from pipeline.errors import PipelineError
from pipeline.prompts.channels import Channel
from pipeline.store import writer
from pipeline.store.layout import CHUNK_TOKENS, HEADER, ROWS, SHARD, CacheLayout, ShardRows, shard_path
from pipeline.store.reader import open_split
from pipeline.store.writer import ShardContents, read_report, write_header, write_shard
from tests.support.damage import flip

FEATURE_SIZE = 6
LAYOUT = CacheLayout(stored="bfloat16", feature_size=FEATURE_SIZE, num_tapped=2)
REPORT_KEYS = {"a", "bytes"}
LENGTHS = {"train": ([300, 5, 411], [2, 700]), "heldout": ([9],)}


def _sequences(split: str, shard: int) -> list[tuple[np.ndarray, np.ndarray]]:
    random = np.random.default_rng([len(split), shard])
    return [
        (
            random.integers(0, 2**31, count, dtype=np.int32),
            random.normal(size=(count, FEATURE_SIZE)).astype(ml_dtypes.bfloat16),
        )
        for count in LENGTHS[split][shard]
    ]


def _write(root: Path, split: str, shard: int, *, spoil: float | None = None) -> None:
    sequences = _sequences(split, shard)
    features = np.concatenate([features for _, features in sequences])
    if spoil is not None:
        features[302, 4] = spoil
    count = len(sequences)
    rows = ShardRows(
        prompt_ids=[f"{split}-{shard}-{index}" for index in range(count)],
        efforts=["low"] * count,
        finish_reasons=["stop"] * count,
        num_tokens=[len(tokens) for tokens, _ in sequences],
        prompt_tokens=[1] * count,
    )
    tokens = np.concatenate([tokens for tokens, _ in sequences])
    channels = (tokens % len(Channel)).astype(np.uint8)
    path = shard_path(root, split, shard)
    contents = ShardContents(rows=rows, token_ids=tokens, channels=channels, features=features)
    write_shard(path, contents, layout=LAYOUT, fingerprint="f", report={"a": 1})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split, shards in LENGTHS.items():
        for shard in range(len(shards)):
            _write(tmp_path, split, shard)
    write_header(tmp_path, LAYOUT, {split: len(shards) for split, shards in LENGTHS.items()})
    return tmp_path


@pytest.mark.parametrize("split", LENGTHS)
def test_sequences_come_back_exactly_in_any_order(root: Path, split: str) -> None:
    wanted = [sequence for shard in range(len(LENGTHS[split])) for sequence in _sequences(split, shard)]
    found = open_split(root, split)
    assert found.num_sequences == len(wanted)
    assert found.num_tokens.tolist() == [len(tokens) for tokens, _ in wanted]
    assert found.prompt_tokens.tolist() == [1] * len(wanted)
    order = [*range(len(wanted))][::-1] + [0]
    for index, sequence in zip(order, found.read(order), strict=True):
        assert sequence.features.dtype == ml_dtypes.bfloat16
        assert sequence.token_ids.dtype == np.int32
        assert np.array_equal(sequence.token_ids, wanted[index][0])
        assert np.array_equal(sequence.features, wanted[index][1])


def test_the_same_shard_written_twice_has_the_same_bytes(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("again")
    _write(other, "train", 0)
    first, second = (shard_path(where, "train", 0) / SHARD for where in (root, other))
    assert first.read_bytes() == second.read_bytes()


def test_a_token_is_stored_once(root: Path) -> None:
    shard = shard_path(root, "train", 1)
    held = sum(file.stat().st_size for file in shard.rglob("*") if file.is_file() and "c" in file.parts)
    chunks = -(-702 // CHUNK_TOKENS)
    assert held <= chunks * CHUNK_TOKENS * LAYOUT.token_bytes + 200


@pytest.mark.parametrize("verify", [True, False], ids=["by sha256", "by the chunk's crc32c alone"])
@pytest.mark.parametrize("name", ["features/c/0/0", "tokens/c/0"])
def test_a_flipped_byte_is_named_and_not_read(root: Path, name: str, verify: bool) -> None:
    file = shard_path(root, "train", 0) / name
    flip(file, 40)
    with pytest.raises(PipelineError, match=re.escape(f"{root}/train/00000")):
        open_split(root, "train", verify=verify).read([0])
    assert len(open_split(root, "train", verify=verify).read([3])) == 1  # the other shard is whole
    assert read_report(shard_path(root, "train", 0), "f") is None


def test_features_that_are_not_finite_are_named_by_shard_and_row(root: Path) -> None:
    for value in (np.nan, np.inf, -np.inf):
        split = "train"
        path = shard_path(root, split, 0)
        path.rename(root / f"away{value}")
        _write(root, split, 0, spoil=value)
        reader = open_split(root, split)
        reader.read([0, 2])
        with pytest.raises(PipelineError, match=r"train/00000, row 1 \(prompt train-0-1\).*1 tokens.*position 2"):
            reader.read([0, 1])


def test_a_torn_shard_is_absent(root: Path) -> None:
    path = shard_path(root, "train", 1)
    assert read_report(path, "f").keys() == REPORT_KEYS
    assert read_report(path, "another") is None
    (path / SHARD).unlink()
    assert read_report(path, "f") is None
    with pytest.raises(PipelineError, match="lacks the shards 00001"):
        open_split(root, "train")


def test_a_killed_write_leaves_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        _write(tmp_path, "train", 0)
    monkeypatch.undo()
    assert not shard_path(tmp_path, "train", 0).exists()
    _write(tmp_path, "train", 0)
    assert read_report(shard_path(tmp_path, "train", 0), "f").keys() == REPORT_KEYS


def test_changed_rows_are_named_when_the_split_is_opened(root: Path) -> None:
    file = shard_path(root, "heldout", 0) / ROWS
    file.write_text(file.read_text().replace("9", "8"))
    with pytest.raises(PipelineError, match=r"heldout/00000 is damaged \(rows.json: sha256 differs"):
        open_split(root, "heldout")


def test_another_format_is_refused(root: Path) -> None:
    header = json.loads((root / HEADER).read_text())
    (root / HEADER).write_text(json.dumps(header | {"format": 99}))
    with pytest.raises(PipelineError, match="has format 99, this version reads 2"):
        open_split(root, "train")


def test_a_sequence_out_of_range_is_an_index_error(root: Path) -> None:
    with pytest.raises(IndexError, match="sequence 5 of 5"):
        open_split(root, "train").read([5])
    with pytest.raises(IndexError):
        open_split(root, "train").read([-1])
