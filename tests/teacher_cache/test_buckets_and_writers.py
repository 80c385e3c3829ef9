"""The stage with its cache in a bucket, by several writers, with int8 or no features, and read again by the target."""

import dataclasses
import logging
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from pipeline.artifacts import artifact, storage
from pipeline.artifacts.artifact import Artifact
from pipeline.artifacts.storage import BucketPath, StoragePath
from pipeline.config.choices import FeatureSource, FeatureStore
from pipeline.config.fields import TEACHER_CACHE
from pipeline.config.schema import PipelineConfig
from pipeline.errors import PipelineError
from pipeline.prompts.channels import Channel
from pipeline.store import writer
from pipeline.store.layout import HEADER, SHARD
from pipeline.store.reader import open_split
from pipeline.teacher_cache import completion, forecast, job, shards, stage
from pipeline.teacher_cache.writers import Writer
from pipeline.tracking.run import Run
from pipeline.train.data.padded import PaddedBatches
from pipeline.workspace.workspace import Workspace
from tests.support import buckets
from tests.support.compiled import QUICKLY
from tests.support.damage import flip
from tests.support.paths import ROOT

LIMIT_SECONDS = 300
STAGE_PROCESS = """
import pickle, sys
from pipeline.teacher_cache import stage
from pipeline.tracking.run import SilentRun
stage.run(pickle.load(open(sys.argv[1], "rb")), SilentRun())
"""
MADE_LAST = (stage.SUMMARY, stage.PROMPTS, HEADER, artifact.CONTRACT, artifact.MANIFEST)


def _address(config: PipelineConfig) -> StoragePath:
    return Workspace(config).address(TEACHER_CACHE)


def _made_by(config: PipelineConfig) -> Artifact:
    return artifact.read(_address(config), TEACHER_CACHE, make_with="the test", verify=True)


def _begin_from(cache: Artifact, root: StoragePath, *without: str) -> None:
    """Leave at `root` what an interrupted run would: an undisturbed one's shards, but for some."""
    for name in storage.list_files(cache.path):
        if name in MADE_LAST or name.startswith(without):
            continue
        if isinstance(root, Path):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes((cache.path / name).read_bytes())


@pytest.fixture(scope="module", params=buckets.SERVICES)
def bucket(request: pytest.FixtureRequest) -> Iterator[tuple[str, dict[str, str]]]:
    with buckets.EMULATORS[request.param]() as found:
        yield found


@pytest.fixture
def in_bucket(
    bucket: tuple[str, dict[str, str]], config: PipelineConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> PipelineConfig:
    url, environment = bucket
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config.teacher_cache.path = f"{url}/{tmp_path.name}/cache"
    return config


def test_a_bucket_holds_what_a_directory_holds(
    cache: Artifact, in_bucket: PipelineConfig, tracker: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended while a shard is copied, and run again; train and read from the same URL."""
    root = _address(in_bucket)
    _begin_from(cache, root, "train/00001", "heldout/00000")

    def torn(_built: Path, path: BucketPath, _files: dict) -> None:
        (path / "tokens" / "zarr.json").write_bytes(b"half")
        (path / "of_another_run").write_bytes(b"stray")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(writer, "_copy", torn)
        with pytest.raises(KeyboardInterrupt):
            stage.run(in_bucket, tracker)
    assert not artifact.exists(root)
    stage.run(in_bucket, tracker)
    remade = _made_by(in_bucket)
    assert remade.path == root
    assert remade.fingerprint == cache.fingerprint
    assert storage.list_files(root) == storage.list_files(cache.path)
    assert not list((Path(in_bucket.output_dir) / TEACHER_CACHE).iterdir())
    found, wanted = (open_split(path, "train") for path in (root, cache.path))
    first, second = (PaddedBatches(split, num_sequences=4, num_anchors=3, seed=0).at(1) for split in (found, wanted))
    for name in wanted_names(first):
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    stage.run(in_bucket, tracker)  # it stands
    assert _made_by(in_bucket) == remade


def wanted_names(batch: dict[str, np.ndarray]) -> set[str]:
    assert {"token_ids", "generated", "features", "anchors"} <= batch.keys()
    return set(batch)


def test_a_changed_object_of_a_bucket_is_named_and_not_read(cache: Artifact, in_bucket: PipelineConfig) -> None:
    root = _address(in_bucket)
    for name in storage.list_files(cache.path):
        (root / name).write_bytes((cache.path / name).read_bytes())
    damaged = root / "train" / "00000" / "features" / "c" / "0" / "0"
    flip(damaged, 77)
    split = open_split(root, "train")
    with pytest.raises(PipelineError, match=rf"{root}/train/00000 is damaged \(features/c/0/0: sha256 differs"):
        split.read([0])
    storage.remove(root / "heldout" / "00000" / SHARD)
    with pytest.raises(PipelineError, match=r"heldout/00000/shard.json: missing"):
        artifact.read(root, TEACHER_CACHE, make_with="the test")


def test_what_a_bucket_gives_back_changed_is_no_shard(
    cache: Artifact, in_bucket: PipelineConfig, tracker: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = _address(in_bucket)
    _begin_from(cache, root, "train/00001")
    write = BucketPath.write_bytes

    def changing(path: BucketPath, data: bytes) -> None:
        write(path, data[:-1] + bytes([data[-1] ^ 1]) if str(path).endswith("features/c/0/0") else data)

    monkeypatch.setattr(BucketPath, "write_bytes", changing)
    with pytest.raises(PipelineError, match=r"train/00001 did not take what was written to it \(features/c/0/0: sha2"):
        stage.run(in_bucket, tracker)
    assert not (root / "train" / "00001" / SHARD).is_file()


def _writers(config: PipelineConfig, count: int) -> list[PipelineConfig]:
    cache = config.teacher_cache
    return [
        dataclasses.replace(config, teacher_cache=dataclasses.replace(cache, writer=writer, num_writers=count))
        for writer in range(count)
    ]


def test_writers_make_disjoint_shards_and_the_last_one_completes_the_cache(
    cache: Artifact, config: PipelineConfig, tracker: Run, caplog: pytest.LogCaptureFixture, monkeypatch
) -> None:
    scratch = artifact.scratch_of(_address(config))
    _begin_from(cache, scratch, "train/00000", "train/00001")
    (scratch / "train" / "00001.partial").mkdir(parents=True)  # which the other one is writing now
    make, made_paths = shards.make_shard, []
    monkeypatch.setattr(shards, "make_shard", lambda plan, *rest: made_paths.append(plan.path) or make(plan, *rest))
    first, second = _writers(config, 2)
    with caplog.at_level(logging.INFO, "pipeline"):
        stage.run(first, tracker)
    assert "this writer's 3 shards are complete; 1 of 5 are still missing, of the writers 1" in caplog.text
    assert made_paths == [scratch / "train" / "00000"]
    assert not artifact.exists(_address(config))
    assert (scratch / "train" / "00001.partial").is_dir()
    stage.run(second, tracker)
    assert made_paths == [scratch / "train" / "00000", scratch / "train" / "00001"]
    assert _made_by(config).fingerprint == cache.fingerprint
    assert [entry.name for entry in _address(config).parent.iterdir()] == [_address(config).name]
    stage.run(first, tracker)  # it stands for the other one too


def test_two_writers_that_end_at_the_same_time_complete_the_cache_once(
    cache: Artifact, config: PipelineConfig, tracker: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    _begin_from(cache, artifact.scratch_of(_address(config)))
    together, checks = threading.Barrier(2, timeout=120), []
    make_shards, check = stage._make_shards, completion._check

    def made_together(*arguments: object) -> object:
        rate = make_shards(*arguments)
        together.wait()
        return rate

    monkeypatch.setattr(stage, "_make_shards", made_together)
    monkeypatch.setattr(completion, "_check", lambda *arguments: checks.append(1) or check(*arguments))
    with ThreadPoolExecutor(2) as both:
        list(both.map(lambda each: stage.run(each, tracker), _writers(config, 2)))
    assert len(checks) == 1
    assert _made_by(config).fingerprint == cache.fingerprint
    assert [entry.name for entry in _address(config).parent.iterdir()] == [_address(config).name]


def test_writers_that_complete_a_bucket_at_the_same_time_leave_one_cache(
    cache: Artifact, in_bucket: PipelineConfig, tracker: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = _address(in_bucket)
    _begin_from(cache, root)
    together, make_shards = threading.Barrier(2, timeout=120), stage._make_shards
    monkeypatch.setattr(stage, "_make_shards", lambda *args: (make_shards(*args), together.wait())[0])
    with ThreadPoolExecutor(2) as both:
        list(both.map(lambda each: stage.run(each, tracker), _writers(in_bucket, 2)))
    assert _made_by(in_bucket).fingerprint == cache.fingerprint
    assert storage.list_files(root) == storage.list_files(cache.path)


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed_make_the_cache_of_one(
    cache: Artifact, config: PipelineConfig, tmp_path: Path, tracker: Run
) -> None:
    """From nothing, side by side; the second is ended by force and run again."""
    processes = []
    for index, writer_config in enumerate(_writers(config, 2)):
        pickled = tmp_path / f"{index}.pickle"
        pickled.write_bytes(pickle.dumps(writer_config))
        command = [sys.executable, "-c", STAGE_PROCESS, str(pickled)]
        processes.append(subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)} | QUICKLY))
    first = artifact.scratch_of(_address(config)) / "train" / "00001" / SHARD
    deadline = time.monotonic() + LIMIT_SECONDS
    while not first.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    processes[1].kill()
    assert processes[1].wait(LIMIT_SECONDS) != 0
    assert processes[0].wait(LIMIT_SECONDS) == 0
    assert not artifact.exists(_address(config))
    stage.run(_writers(config, 2)[1], tracker)
    assert _made_by(config).fingerprint == cache.fingerprint


def test_features_kept_as_int8_pass_the_check_and_take_half(
    cache: Artifact, config: PipelineConfig, tracker: Run, caplog: pytest.LogCaptureFixture
) -> None:
    config.teacher_cache.features = FeatureStore.int8
    config.teacher_cache.verify = 0.5
    with caplog.at_level(logging.INFO, "pipeline"):
        stage.run(config, tracker)
    remade = _made_by(config)
    split, whole = open_split(remade.path, "train"), open_split(cache.path, "train")
    assert split.layout.token_bytes == 4 + 1 + 80 + 2 * 4
    assert "tokens of 93 bytes (features: int8) in 5 shards" in caplog.text
    assert "MiB are free" in caplog.text
    assert "the first shard took" in caplog.text
    assert tracker.metrics["teacher_cache/gold_accept_length"] == 4.0
    assert 0.001 < tracker.metrics["teacher_cache/verified_worst_difference"] < 0.0125
    for found, wanted in zip(split.read(range(3)), whole.read(range(3)), strict=True):
        np.testing.assert_array_equal(found.token_ids, wanted.token_ids)
        assert found.features.dtype == ml_dtypes.bfloat16


def test_a_cache_for_live_training_holds_the_same_tokens_and_no_features(
    cache: Artifact, config: PipelineConfig, tracker: Run
) -> None:
    config.train.features = FeatureSource.live
    config.teacher_cache.verify = 0.2
    stage.run(config, tracker)
    remade = _made_by(config)
    assert remade.settings["teacher_cache.features"] == "none"
    assert not [name for name in storage.list_files(remade.path) if "features" in name or "scales" in name]
    assert tracker.metrics["teacher_cache/gold_accept_length"] == 4.0
    split, whole = open_split(remade.path, "train"), open_split(cache.path, "train")
    assert tracker.metrics["teacher_cache/verified_sequences"] == np.ceil(0.2 * split.num_sequences)
    assert split.layout.token_bytes == 5
    stored, asked = split.read(range(5)), whole.read(range(5), features=False)
    for found, wanted in zip(stored, asked, strict=True):
        assert found.features is wanted.features is None
        np.testing.assert_array_equal(found.token_ids, wanted.token_ids)
        np.testing.assert_array_equal(found.channels, wanted.channels)


def test_channels_begin_with_the_prompt_and_are_counted(cache: Artifact, tracker: Run, config: PipelineConfig) -> None:
    config.teacher_cache.path = str(cache.path)
    stage.run(config, tracker)
    split = open_split(cache.path, "train")
    counts = np.zeros(len(Channel), np.int64)
    for sequence in split.read(range(split.num_sequences)):
        assert np.array_equal(
            sequence.channels == Channel.prompt, np.arange(len(sequence.channels)) < sequence.prompt_tokens
        )
        counts += np.bincount(sequence.channels, minlength=len(Channel))
    counted = tracker.documents[stage.SUMMARY]["splits"]["train"]["num_tokens_by_channel"]
    assert counted == {channel.name: counts[channel] for channel in Channel}


def test_a_cache_that_stands_is_read_again_by_the_target(
    cache: Artifact, config: PipelineConfig, tracker: Run, caplog: pytest.LogCaptureFixture
) -> None:
    config.teacher_cache.path, config.teacher_cache.verify = str(cache.path), 0.3
    with caplog.at_level(logging.INFO, "pipeline"):
        stage.run(config, tracker)
    split = open_split(cache.path, "train")
    assert tracker.metrics["teacher_cache/verified_sequences"] == np.ceil(0.3 * split.num_sequences)
    assert tracker.metrics["teacher_cache/verified_worst_difference"] < 0.01
    assert "train sequences" in caplog.text


def test_another_target_than_the_one_that_was_cached_is_found_out(
    cache: Artifact, config: PipelineConfig, tracker: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.teacher_cache.path, config.teacher_cache.verify = str(cache.path), 0.3
    load_target = job.load_target

    def another(*arguments: object) -> object:
        target = load_target(*arguments)
        weights = dataclasses.replace(target.weights, embedding=target.weights.embedding[::-1])
        return dataclasses.replace(target, weights=weights)

    monkeypatch.setattr(job, "load_target", another)
    with pytest.raises(PipelineError, match=r"train/0000\d, row \d: the features of \d+ of \d+ tokens") as raised:
        stage.run(config, tracker)
    assert "tokens are not those that the target chooses" in str(raised.value)


@pytest.mark.parametrize("changed", [{"verify": 0.5}, {"writer": 1, "num_writers": 2}, {}], ids=str)
def test_what_does_not_change_the_bytes_does_not_change_the_address(config: PipelineConfig, changed: dict) -> None:
    before = _address(config)
    config.teacher_cache = dataclasses.replace(config.teacher_cache, **changed)
    assert _address(config) == before


def test_features_have_an_address_of_their_own(config: PipelineConfig) -> None:
    found = {}
    for features in (None, *FeatureStore):
        config.teacher_cache.features = features
        found[features] = _address(config)
    assert found[None] == found[FeatureStore.bfloat16]
    assert len(set(found.values())) == 3
    config.train.features, config.teacher_cache.features = FeatureSource.live, None
    assert _address(config) == found[FeatureStore.none]


def test_many_answers_are_tried_before_they_are_begun(
    config: PipelineConfig, tracker: Run, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecast, "TRIAL_WORTH", 4)

    def enough(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Writer, "clear", enough)
    with caplog.at_level(logging.INFO, "pipeline"), pytest.raises(KeyboardInterrupt):
        stage.run(config, tracker)
    assert "26 answers to go, tried with 4" in caplog.text
    assert "hours" in caplog.text


def test_a_bucket_needs_room_for_one_shard_on_this_machine(
    in_bucket: PipelineConfig, tracker: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 10**4))
    with (
        caplog.at_level(logging.INFO, "pipeline"),
        pytest.raises(PipelineError, match="a shard on its way to the bucket needs"),
    ):
        stage.run(in_bucket, tracker)
    assert "what a bucket can hold is not known" in caplog.text
