"""Bytes that were changed, torn or lost anywhere in a cache are named, and nothing is trained on them."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.artifacts import artifact, storage
from pipeline.errors import PipelineError
from pipeline.store import feature_codec, reader, writer
from pipeline.store.layout import HEADER, ROWS, SHARD
from pipeline.store.reader import open_split
from pipeline.train.data.padded import PaddedBatches
from pipeline.train.data.prefetch import prefetch
from tests.support import buckets
from tests.support import store as tiny_store
from tests.support.damage import flip

SHARD_FILES = ("tokens/c/0", "tokens/zarr.json", "channels/c/0", "channels/zarr.json", "features/c/0/0")
SHARD_FILES += ("features/zarr.json", "scales/c/0/0", "scales/zarr.json", ROWS, SHARD)
FILES = [*(f"train/00000/{name}" for name in SHARD_FILES), HEADER, artifact.MANIFEST]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tiny_store.build(tmp_path / "cache", "int8").path


def _flip(file: Path, place: float) -> None:
    flip(file, int(place * (file.stat().st_size - 1)))


def _train(root: Path) -> None:
    """What stage=train does with a cache: open it, and make its batches ahead of their use."""
    artifact.read(root, tiny_store.KIND, make_with="the test")
    split = open_split(root, "train")
    batches = PaddedBatches(split, num_sequences=2, num_anchors=3, seed=0)
    made = prefetch(batches.at, 0)
    for _ in range(batches.steps_per_epoch):
        next(made)
    made.close()


def test_a_whole_cache_is_trained_on(root: Path) -> None:
    _train(root)


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0], ids=["first byte", "middle", "last byte"])
@pytest.mark.parametrize("name", FILES)
def test_one_flipped_byte_stops_training_with_the_name_of_the_file(root: Path, name: str, place: float) -> None:
    _flip(root / name, place)
    with pytest.raises(PipelineError, match=name.removeprefix("train/00000/")) as raised:
        _train(root)
    assert str(root) in str(raised.value)


@pytest.mark.parametrize("name", FILES)
def test_a_torn_file_stops_training_with_its_name(root: Path, name: str) -> None:
    data = (root / name).read_bytes()
    (root / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(PipelineError, match=name.removeprefix("train/00000/")):
        _train(root)


@pytest.mark.parametrize("name", FILES)
def test_a_lost_file_stops_training_with_its_name(root: Path, name: str) -> None:
    (root / name).unlink()
    with pytest.raises(PipelineError, match="no complete" if name == artifact.MANIFEST else name.rpartition("/")[2]):
        _train(root)


def test_every_byte_of_the_manifest_counts(root: Path) -> None:
    whole = (root / artifact.MANIFEST).read_bytes()
    for place in range(0, len(whole) - 1, 17):
        _flip(root / artifact.MANIFEST, place / (len(whole) - 1))
        with pytest.raises(PipelineError, match=artifact.MANIFEST):
            artifact.read(root, tiny_store.KIND, make_with="the test")
        (root / artifact.MANIFEST).write_bytes(whole)


def test_a_shard_of_another_run_is_refused(root: Path, tmp_path: Path) -> None:
    """Whole in itself, with other numbers: only the manifest can tell."""
    other = tiny_store.build(tmp_path / "other", "int8", spoil=3.0).path
    (root / "train" / "00000").rename(tmp_path / "away")
    (other / "train" / "00000").rename(root / "train" / "00000")
    with pytest.raises(PipelineError, match=r"train/00000/shard.json: sha256 differs"):
        open_split(root, "train")


def test_a_changed_contract_is_named_without_asking(root: Path) -> None:
    _flip(root / artifact.CONTRACT, 0.5)
    with pytest.raises(PipelineError, match=r"contract.json: sha256 differs"):
        artifact.read(root, tiny_store.KIND, make_with="the test")


def test_only_the_file_that_is_read_from_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a sequence of a large shard can be read without reading the shard."""
    for module in (reader, writer):
        monkeypatch.setattr(module, "FILE_TOKENS", 512)
    root = tiny_store.build(tmp_path / "cache").path  # sequences of 300, 5 and 411 tokens: the last lies in two files
    assert sorted((root / "train" / "00000" / "features" / "c").iterdir())[-1].name == "1"
    _flip(root / "train" / "00000" / "features" / "c" / "1" / "0", 0.5)
    split = open_split(root, "train")
    whole = tiny_store.sequences("train", 0)
    for index, sequence in enumerate(split.read([0, 1])):
        np.testing.assert_array_equal(sequence.features, whole[index][2])
    with pytest.raises(PipelineError, match=r"features/c/1/0: sha256 differs"):
        split.read([2])


@pytest.mark.parametrize("stored", ["bfloat16", "int8"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_are_named_and_not_trained_on(tmp_path: Path, stored: str, value: float) -> None:
    """With every sha256 right: written so."""
    root = tiny_store.build(tmp_path / "cache", stored, spoil=value).path
    with pytest.raises(PipelineError, match=r"train/00000, row 1 \(prompt train-0-1\).*1 tokens.*position 2"):
        _train(root)


@pytest.mark.buckets
def test_a_bucket_that_is_gone_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While training reads: nobody is asked to delete the cache."""
    monkeypatch.setattr(storage, "RETRIES", {"max_retries": 2, "initial_delay": "10ms", "max_delay": "10ms"})
    storage.tensorstore_context.cache_clear()
    with buckets.s3() as (url, environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        root = storage.parse_path(f"{url}/a/cache")
        tiny_store.build(root, staging=tmp_path / "staging")
        split = open_split(root, "train", verify=False)
        assert len(split.read([0])) == 1
    with pytest.raises(PipelineError, match=rf"{root}/train/00000 cannot be reached: .*check the network") as raised:
        split.read([1])
    assert "delete" not in str(raised.value)
    storage.tensorstore_context.cache_clear()


def test_a_reader_that_is_asked_not_to_compare_sees_it_by_the_chunks_own_sums(root: Path) -> None:
    _flip(root / "train" / "00000" / "scales" / "c" / "0" / "0", 0.2)
    with pytest.raises(PipelineError, match=r"train/00000, row 0: .*scales"):
        open_split(root, "train", verify=False).read([0])


def test_what_was_read_is_what_was_written_but_for_the_steps_of_int8(root: Path) -> None:
    for index, sequence in enumerate(open_split(root, "train").read([0, 1, 2])):
        token_ids, channels, wanted = tiny_store.sequences("train", 0)[index]
        np.testing.assert_array_equal(sequence.token_ids, token_ids)
        np.testing.assert_array_equal(sequence.channels, channels)
        again = feature_codec.decode(feature_codec.encode(wanted, "int8", tiny_store.NUM_TAPPED))
        np.testing.assert_array_equal(sequence.features, again)
