import errno
import json
import multiprocessing
import os
import signal
import time

import pytest

from pipeline import artifacts

SETTINGS = {"steps": 3, "parent": "abc"}
CONTRACT = {"block_size": 8}


def build(path, data=b"tensor", resume=False):
    scratch = artifacts.open_scratch(path, resume=resume)
    (scratch / "shards").mkdir(exist_ok=True)
    artifacts.write_bytes(scratch / "shards" / "0.bin", data)
    artifacts.write_json(scratch / "info.json", {"b": 2, "a": 1})
    return artifacts.seal(path, kind="teacher_cache", settings=SETTINGS, contract=CONTRACT)


def read(path, **options):
    return artifacts.read(path, "teacher_cache", make_with="python -m pipeline stage=teacher_cache", **options)


def test_what_was_sealed_can_be_read(tmp_path):
    path = tmp_path / "cache"
    sealed = build(path)
    found = read(path, verify=True)
    assert found == sealed
    assert (found.settings, found.contract) == (SETTINGS, CONTRACT)
    assert set(found.files) == {"contract.json", "info.json", "shards/0.bin"}
    assert not artifacts.scratch_of(path).exists()


def test_equal_bytes_give_equal_manifests_and_other_bytes_another_fingerprint(tmp_path):
    first, again, other = build(tmp_path / "a"), build(tmp_path / "b"), build(tmp_path / "c", data=b"tensoR")
    assert (first.path / artifacts.MANIFEST).read_bytes() == (again.path / artifacts.MANIFEST).read_bytes()
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_the_address_changes_with_every_setting_and_not_with_their_order(tmp_path):
    def address(**settings):
        return artifacts.address(tmp_path, "train", "tiny", settings)

    assert address(a=1, b=2) == address(b=2, a=1)
    assert len({address(a=1, b=2), address(a=1, b=3), address(a=1), address(a="1", b=2)}) == 4
    assert address(a=1).parent == tmp_path / "train"


def test_nothing_there_is_told_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(artifacts.MissingArtifact, match=r"nothing is there.*python -m pipeline stage=teacher_cache"):
        read(tmp_path / "cache")


def test_a_scratch_directory_is_no_artifact(tmp_path):
    path = tmp_path / "cache"
    scratch = artifacts.open_scratch(path, resume=False)
    artifacts.write_bytes(scratch / "0.bin", b"half")
    assert not artifacts.exists(path)
    with pytest.raises(artifacts.MissingArtifact, match="an unfinished one is at"):
        read(path)


def test_a_directory_without_a_manifest_is_absent_and_is_replaced(tmp_path):
    path = tmp_path / "cache"
    path.mkdir()
    (path / "stray").write_text("left by hand")
    assert not artifacts.exists(path)
    build(path)
    assert not (path / "stray").exists()
    read(path, verify=True)


def test_a_complete_artifact_is_never_replaced(tmp_path):
    path = tmp_path / "cache"
    first = build(path)
    with pytest.raises(artifacts.PipelineError, match="appeared while it was being built"):
        build(path, data=b"other")
    assert read(path, verify=True) == first


def test_scratch_is_kept_to_resume_and_emptied_to_start_over(tmp_path):
    path = tmp_path / "cache"
    (artifacts.open_scratch(path, resume=False) / "0.bin").write_bytes(b"shard")
    assert (artifacts.open_scratch(path, resume=True) / "0.bin").exists()
    assert not (artifacts.open_scratch(path, resume=False) / "0.bin").exists()


def test_another_kind_is_refused(tmp_path):
    build(tmp_path / "cache")
    with pytest.raises(artifacts.PipelineError, match="holds a teacher_cache, wanted a train"):
        artifacts.read(tmp_path / "cache", "train", make_with="python -m pipeline stage=train")


def test_every_damaged_file_is_named(tmp_path):
    path = tmp_path / "cache"
    build(path)
    (path / "info.json").unlink()
    (path / "shards" / "0.bin").write_bytes(b"short")
    with pytest.raises(artifacts.PipelineError) as raised:
        read(path)
    assert "info.json: missing" in str(raised.value)
    assert "shards/0.bin: 5 bytes, written with 6" in str(raised.value)


def test_a_flipped_bit_is_found_when_the_reader_asks_for_it(tmp_path):
    path = tmp_path / "cache"
    build(path)
    (path / "shards" / "0.bin").write_bytes(b"tensoR")
    read(path)
    with pytest.raises(artifacts.PipelineError, match=r"shards/0\.bin: sha256 differs"):
        read(path, verify=True)


def _build_forever(root):
    for number in range(10_000):
        build(root / f"cache-{number}", data=bytes(20_000))


def test_a_kill_at_any_instant_leaves_every_artifact_complete_or_absent(tmp_path):
    for attempt in range(5):
        root = tmp_path / str(attempt)
        writer = multiprocessing.get_context("spawn").Process(target=_build_forever, args=(root,))
        writer.start()
        while not artifacts.exists(root / "cache-3"):
            time.sleep(0.002)
        time.sleep(0.0013 * attempt)
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        for path in root.iterdir():
            if not path.name.endswith(".partial"):
                read(path, verify=True)
        unfinished = root / f"cache-{len([path for path in root.iterdir() if artifacts.exists(path)])}"
        build(unfinished, data=bytes(20_000), resume=True)
        first = json.loads((root / "cache-0" / artifacts.MANIFEST).read_text())
        assert read(unfinished, verify=True).fingerprint == first["fingerprint"]


def test_a_file_is_whole_or_absent(tmp_path, monkeypatch):
    artifacts.write_json(tmp_path / "state.json", {"step": 1})

    def lost_power(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", lost_power)
    with pytest.raises(OSError, match="Input/output error"):
        artifacts.write_json(tmp_path / "state.json", {"step": 2})
    assert json.loads((tmp_path / "state.json").read_text()) == {"step": 1}


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(OSError(errno.ENOSPC, "No space left on device"), id="the system's"),
        pytest.param(ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device"), id="tensorstore's"),
        pytest.param(OSError(errno.EROFS, "Read-only file system"), id="read-only"),
    ],
)
def test_a_disk_that_takes_no_more_is_one_clear_error(tmp_path, error):
    with (
        pytest.raises(artifacts.PipelineError, match=r"while writing .*MiB free.*output_dir"),
        artifacts.disk_errors(tmp_path / "outputs" / "cache"),
    ):
        raise error


@pytest.mark.parametrize("error", [OSError(errno.EPERM, "not permitted"), ValueError("shapes differ")])
def test_other_errors_pass_the_disk_check_unchanged(tmp_path, error):
    with pytest.raises(type(error)) as raised, artifacts.disk_errors(tmp_path):
        raise error
    assert raised.value is error


def test_space_is_asked_for_before_any_work(tmp_path):
    artifacts.require_free_space(tmp_path / "not" / "yet", 1, "the cache")
    with pytest.raises(artifacts.PipelineError, match="the cache needs"):
        artifacts.require_free_space(tmp_path / "not" / "yet", 2**62, "the cache")


def test_provenance_has_no_clock_and_no_host():
    made = [artifacts.provenance("train", {"seed": 0}, {"teacher_cache": "abc"}) for _ in range(2)]
    assert made[0] == made[1]
    assert set(made[0]) == {"stage", "config", "git_commit", "packages", "parents"}
    assert made[0]["packages"]["easydel"] == "0.3.0"
