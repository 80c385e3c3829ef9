import errno
import json
import multiprocessing
import os
import signal
import time

import pytest

from pipeline.artifacts import artifact
from pipeline.artifacts.artifact import Parent
from pipeline.artifacts.files import disk_errors, require_free_space, write_bytes, write_json
from pipeline.artifacts.provenance import provenance
from pipeline.errors import MissingArtifact, PipelineError

SETTINGS = {"train.steps": 3}
PARENTS = {"target": Parent(key="abc", fingerprint="f" * 64)}
CONTRACT = {"block_size": 8}


def build(path, data=b"tensor", resume=False):
    scratch = artifact.open_scratch(path, resume=resume)
    (scratch / "shards").mkdir(exist_ok=True)
    write_bytes(scratch / "shards" / "0.bin", data)
    write_json(scratch / "info.json", {"b": 2, "a": 1})
    return artifact.seal(
        path, kind="teacher_cache", key="0123456789ab", settings=SETTINGS, parents=PARENTS, contract=CONTRACT
    )


def read(path, **options):
    return artifact.read(path, "teacher_cache", make_with="python -m pipeline stage=teacher_cache", **options)


def test_what_was_sealed_can_be_read(tmp_path):
    path = tmp_path / "cache"
    sealed = build(path)
    found = read(path, verify=True)
    assert found == sealed
    assert (found.key, found.settings, found.parents, found.contract) == ("0123456789ab", SETTINGS, PARENTS, CONTRACT)
    assert set(found.files) == {"contract.json", "info.json", "shards/0.bin"}
    assert not artifact.scratch_of(path).exists()


def test_equal_bytes_give_equal_manifests_and_other_bytes_another_fingerprint(tmp_path):
    first, again, other = build(tmp_path / "a"), build(tmp_path / "b"), build(tmp_path / "c", data=b"tensoR")
    assert (first.path / artifact.MANIFEST).read_bytes() == (again.path / artifact.MANIFEST).read_bytes()
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_a_key_changes_with_every_setting_parent_version_and_kind_and_not_with_their_order(tmp_path):
    def key(kind="checkpoint", version=1, parents=None, **settings):
        return artifact.key_of(kind, version, settings, parents or {})

    assert key(a=1, b=2) == key(b=2, a=1)
    keys = [key(a=1, b=2), key(a=1, b=3), key(a=1), key(a="1", b=2), key("draft", a=1), key(version=2, a=1)]
    keys += [key(a=1, parents={"target": "x"}), key(a=1, parents={"target": "y"})]
    assert len(set(keys)) == len(keys)
    path = artifact.address(tmp_path, "checkpoint", "tiny", key(a=1))
    assert path == tmp_path / "checkpoint" / f"tiny-{key(a=1)}"


def test_a_missing_artifact_is_named_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(MissingArtifact, match=r"nothing is there.*python -m pipeline stage=teacher_cache"):
        read(tmp_path / "cache")


def test_a_scratch_directory_is_no_artifact(tmp_path):
    path = tmp_path / "cache"
    scratch = artifact.open_scratch(path, resume=False)
    write_bytes(scratch / "0.bin", b"half")
    assert not artifact.exists(path)
    with pytest.raises(MissingArtifact, match="an unfinished one is at"):
        read(path)


def test_a_directory_without_a_manifest_is_absent_and_is_replaced(tmp_path):
    path = tmp_path / "cache"
    path.mkdir()
    (path / "stray").write_text("left by hand")
    assert not artifact.exists(path)
    build(path)
    assert not (path / "stray").exists()
    read(path, verify=True)


def test_a_complete_artifact_is_never_replaced(tmp_path):
    path = tmp_path / "cache"
    first = build(path)
    with pytest.raises(PipelineError, match="appeared while it was being built"):
        build(path, data=b"other")
    assert read(path, verify=True) == first


def test_scratch_is_kept_to_resume_and_emptied_to_start_over(tmp_path):
    path = tmp_path / "cache"
    (artifact.open_scratch(path, resume=False) / "0.bin").write_bytes(b"shard")
    assert (artifact.open_scratch(path, resume=True) / "0.bin").exists()
    assert not (artifact.open_scratch(path, resume=False) / "0.bin").exists()


def test_another_kind_is_refused(tmp_path):
    build(tmp_path / "cache")
    with pytest.raises(PipelineError, match="holds a teacher_cache, wanted a checkpoint"):
        artifact.read(tmp_path / "cache", "checkpoint", make_with="python -m pipeline stage=train")


def test_every_damaged_file_is_named(tmp_path):
    path = tmp_path / "cache"
    build(path)
    (path / "info.json").unlink()
    (path / "shards" / "0.bin").write_bytes(b"short")
    with pytest.raises(PipelineError) as raised:
        read(path)
    assert "info.json: missing" in str(raised.value)
    assert "shards/0.bin: 5 bytes, written with 6" in str(raised.value)


def test_a_flipped_bit_is_found_when_the_reader_asks_for_it(tmp_path):
    path = tmp_path / "cache"
    build(path)
    (path / "shards" / "0.bin").write_bytes(b"tensoR")
    read(path)
    with pytest.raises(PipelineError, match=r"shards/0\.bin: sha256 differs"):
        read(path, verify=True)


def _build_forever(root):
    for number in range(10_000):
        build(root / f"cache-{number}", data=bytes(20_000))


def test_a_kill_at_any_instant_leaves_every_artifact_complete_or_absent(tmp_path):
    for attempt in range(5):
        root = tmp_path / str(attempt)
        writer = multiprocessing.get_context("spawn").Process(target=_build_forever, args=(root,))
        writer.start()
        while not artifact.exists(root / "cache-3"):
            time.sleep(0.002)
        time.sleep(0.0013 * attempt)
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        for path in root.iterdir():
            if not path.name.endswith(".partial"):
                read(path, verify=True)
        unfinished = root / f"cache-{len([path for path in root.iterdir() if artifact.exists(path)])}"
        build(unfinished, data=bytes(20_000), resume=True)
        first = json.loads((root / "cache-0" / artifact.MANIFEST).read_text())
        assert read(unfinished, verify=True).fingerprint == first["fingerprint"]


def test_a_file_is_whole_or_absent(tmp_path, monkeypatch):
    write_json(tmp_path / "state.json", {"step": 1})

    def lost_power(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", lost_power)
    with pytest.raises(OSError, match="Input/output error"):
        write_json(tmp_path / "state.json", {"step": 2})
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
        pytest.raises(PipelineError, match=r"while writing .*MiB free.*output_dir"),
        disk_errors(tmp_path / "outputs" / "cache"),
    ):
        raise error


@pytest.mark.parametrize("error", [OSError(errno.EPERM, "not permitted"), ValueError("shapes differ")])
def test_other_errors_pass_the_disk_check_unchanged(tmp_path, error):
    with pytest.raises(type(error)) as raised, disk_errors(tmp_path):
        raise error
    assert raised.value is error


def test_space_is_asked_for_before_any_work(tmp_path):
    require_free_space(tmp_path / "not" / "yet", 1, "the cache")
    with pytest.raises(PipelineError, match="the cache needs"):
        require_free_space(tmp_path / "not" / "yet", 2**62, "the cache")


def test_provenance_has_no_clock_and_no_host():
    made = [provenance("train", {"seed": 0}, {"teacher_cache": "abc"}) for _ in range(2)]
    assert made[0] == made[1]
    assert set(made[0]) == {"stage", "config", "git_commit", "packages", "parents"}
    assert made[0]["packages"]["easydel"] == "0.3.0"
