"""Another program's server, started, watched and ended; nothing is left behind, however it ends."""

import os
import re
import signal
import sys
import threading
import time

import pytest

from pipeline.errors import PipelineError
from pipeline.external import launcher
from pipeline.external.launcher import LaunchedServer, signals_passed_to, unknown_flags, version_of
from tests.support.paths import TESTS
from tests.support.ports import free_port

STAND_IN = TESTS / "support" / "programs" / "stand_in_engine.py"


class Started:
    def __init__(self, behaviour):
        port = free_port()
        self.lines, self.said = [], []
        command = [sys.executable, str(STAND_IN), "--port", str(port), "--behaviour", behaviour]
        env = {"HF_TOKEN": "hf_secret"}
        self.server = LaunchedServer(command, url=f"http://127.0.0.1:{port}", on_line=self.lines.append, env=env)

    def healthy(self, seconds=60.0):
        self.server.wait_until_healthy("/health", seconds, self.said.append)
        return self.server

    @property
    def child(self):
        return int(re.search(r"child (\d+)", "\n".join(self.lines))[1])


def is_running(pid):
    """Whether a process is there, and is no zombie that nobody has waited for."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def has_ended(pid):
    until = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < until:
        time.sleep(0.05)
    return not is_running(pid)


def test_a_server_is_waited_for_and_ended_with_all_its_processes():
    started = Started("fine")
    server = started.healthy()
    child = started.child
    assert is_running(child)
    assert server.stop() == 0
    assert has_ended(child)
    assert server.has_ended


def test_secrets_reach_the_program_and_no_log():
    started = Started("fine")
    started.healthy().stop()
    assert started.lines[0] == "starting ***"


def test_a_program_that_ends_at_start_is_an_error_with_its_last_words():
    started = Started("crash")
    with pytest.raises(PipelineError, match=r"ended with 3 before it was healthy(.|\n)*cannot find the weights"):
        started.healthy()
    assert has_ended(started.child)


def test_a_program_that_never_answers_is_ended(monkeypatch):
    monkeypatch.setattr(launcher, "SAY_SECONDS", 0.5)
    started = Started("hang")
    with pytest.raises(PipelineError, match=r"did not answer within 2 s(.|\n)*serve.engine_start_seconds"):
        started.healthy(2.0)
    assert any("of at most 2 s" in line for line in started.said)
    assert has_ended(started.child)


def test_a_program_that_ignores_sigterm_is_killed(monkeypatch):
    monkeypatch.setattr(launcher, "KILL_SECONDS", 1.0)
    started = Started("deaf")
    server = started.healthy()
    assert server.stop() == 128 + signal.SIGKILL
    assert has_ended(started.child)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_and_the_programs_status_comes_back(number):
    started = Started("fine")
    server = started.healthy()
    with signals_passed_to(server):
        threading.Timer(0.3, os.kill, (os.getpid(), number)).start()
        assert server.wait() == 0
    assert has_ended(started.child)


def test_a_second_signal_ends_a_program_that_ignores_the_first():
    started = Started("deaf")
    server = started.healthy()
    with signals_passed_to(server):
        for seconds in (0.3, 0.6):
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM)).start()
        assert server.wait() == 128 + signal.SIGKILL


def test_a_program_that_is_not_there_is_one_clear_error():
    with pytest.raises(PipelineError, match=r"no-such-python cannot be run(.|\n)*serve.engine_python"):
        LaunchedServer(["/no-such-python", "-m", "x"], url="http://127.0.0.1:1", on_line=print)


def test_versions_are_those_of_the_other_environment():
    assert re.fullmatch(r"[\d.]+", version_of(sys.executable, "numpy"))
    with pytest.raises(PipelineError, match="has no package sglang-jax; install it"):
        version_of(sys.executable, "sglang-jax")
    with pytest.raises(PipelineError, match="which cannot be run"):
        version_of("/no-such-python", "numpy")


def test_flags_are_those_that_the_programs_own_help_names():
    program = [sys.executable, str(STAND_IN)]
    command = [*program, "/models/target", "--port", "1", "--page-size", "2"]
    assert unknown_flags(program, "--help", command) == []
    assert unknown_flags(program, "--help", [*command, "--gone", "3"]) == ["--gone"]


def test_a_program_without_a_help_is_one_clear_error():
    with pytest.raises(PipelineError, match="ended with 2"):
        unknown_flags([sys.executable, str(STAND_IN), "--port", "1"], "--no-help", [])
