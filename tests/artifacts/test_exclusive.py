"""Commands that work on one artifact at the same time: one makes it, the others wait for it."""

import multiprocessing
import os
import signal
import socket
import time

import pytest

from pipeline.artifacts import artifact
from pipeline.artifacts.files import write_bytes
from pipeline.artifacts.storage import BucketPath
from pipeline.errors import PipelineError

PROCESSES = multiprocessing.get_context("spawn")
LIMIT_SECONDS = 120


def build(path):
    scratch = artifact.open_scratch(path, resume=False)
    write_bytes(scratch / "0.bin", f"process {os.getpid()}".encode())
    time.sleep(0.2)  # long enough for another command to empty the scratch directory, if it could
    return artifact.seal(path, kind="draft", key="0123456789ab", settings={}, parents={}, contract={})


def build_when_allowed(path, is_held, may_build):
    with artifact.exclusive(path):
        is_held.set()
        assert may_build.wait(LIMIT_SECONDS)
        build(path)


def build_unless_there(path, start, builders):
    assert start.wait(LIMIT_SECONDS)
    with artifact.exclusive(path):
        if not artifact.exists(path):
            build(path)
            builders.put(os.getpid())


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path/draft, and the event that lets it build the artifact."""
    is_held, may_build = PROCESSES.Event(), PROCESSES.Event()
    process = PROCESSES.Process(target=build_when_allowed, args=(tmp_path / "draft", is_held, may_build))
    process.start()
    assert is_held.wait(LIMIT_SECONDS)
    yield process, may_build
    process.kill()
    process.join()


def test_a_second_command_waits_says_for_whom_and_finds_the_artifact_complete(tmp_path, holder, monkeypatch):
    process, may_build = holder
    messages = []

    def info(text, *values):
        messages.append(text % values)
        assert not artifact.exists(tmp_path / "draft")
        may_build.set()

    monkeypatch.setattr(artifact.log, "info", info)
    with artifact.exclusive(tmp_path / "draft"):
        found = artifact.read(tmp_path / "draft", "draft", make_with="the test", verify=True)
    maker = f"process {process.pid}"
    assert (found.path / "0.bin").read_text() == maker
    assert messages == [
        f"{tmp_path / 'draft'} is being made by {maker} on {socket.gethostname()}; waiting for it to end"
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["draft"]


def test_of_commands_that_start_together_one_builds_and_none_destroys_its_work(tmp_path):
    start, builders = PROCESSES.Event(), PROCESSES.Queue()
    arguments = (tmp_path / "draft", start, builders)
    processes = [PROCESSES.Process(target=build_unless_there, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    start.set()
    builder = builders.get(timeout=LIMIT_SECONDS)
    for process in processes:
        process.join(LIMIT_SECONDS)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert builders.empty()
    found = artifact.read(tmp_path / "draft", "draft", make_with="the test", verify=True)
    assert (found.path / "0.bin").read_text() == f"process {builder}"
    assert not artifact.scratch_of(tmp_path / "draft").exists()


def test_a_lock_ends_with_its_process_however_that_ends(tmp_path, holder):
    process, _ = holder
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with artifact.exclusive(tmp_path / "draft"):
        assert (tmp_path / "draft.lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
        build(tmp_path / "draft")
    assert not (tmp_path / "draft.lock").exists()


def test_a_command_that_fails_leaves_the_lock_free(tmp_path):
    with pytest.raises(PipelineError, match="the disk is full"), artifact.exclusive(tmp_path / "draft"):
        raise PipelineError("the disk is full")
    with artifact.exclusive(tmp_path / "draft"):
        build(tmp_path / "draft")
    assert [path.name for path in tmp_path.iterdir()] == ["draft"]


def test_writers_lock_their_parts_alone(tmp_path):
    with artifact.exclusive(tmp_path / "cache", ".0"), artifact.exclusive(tmp_path / "cache", ".1"):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["cache.0.lock", "cache.1.lock"]


def test_in_a_bucket_nothing_is_locked():
    path = BucketPath("gs://bucket/cache")
    with artifact.exclusive(path), artifact.exclusive(path):
        pass
