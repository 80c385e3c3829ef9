"""Starts another program's server, waits until it is healthy, passes its log and signals on, and leaves nothing behind.

The program gets a process group of its own, which is ended as a whole: servers start processes that would outlive them.
"""

import collections
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType

from pipeline.errors import PipelineError

POLL_SECONDS = 0.5
SAY_SECONDS = 10.0  # between two lines of progress
LAST_LINES = 12  # of its log, in an error
HELP_SECONDS = 300.0
KILL_SECONDS = 15.0  # from SIGTERM to SIGKILL
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # to this machine, whatever proxy is set
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "PIPELINE_API_KEYS")  # of the environment, which no log shows


class LaunchedServer:
    """Holds a server's process. `on_line` gets every line of its log, without the values of SECRETS.

    Raises PipelineError when the program cannot be run.
    """

    def __init__(
        self, command: Sequence[str], *, url: str, on_line: Callable[[str], None], env: Mapping[str, str] | None = None
    ) -> None:
        self.url, self._command, self._on_line = url, list(command), on_line
        self._last: collections.deque[str] = collections.deque(maxlen=LAST_LINES)
        environment = {**os.environ, **(env or {})}
        self._secrets = [environment[name] for name in SECRETS if environment.get(name)]
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            raise PipelineError(
                f"{command[0]} cannot be run: {error}; set serve.engine_python to the interpreter of an environment "
                "that has the engine"
            ) from error
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_until_healthy(self, path: str, seconds: float, say: Callable[[str], None]) -> None:
        """Waits until GET `path` answers 200, and says how long it has waited; ends the program when it does not.

        Raises PipelineError when the program ends before, or is not healthy in time.
        """
        started = reported = time.monotonic()
        while not _answers(self.url + path):
            now = time.monotonic()
            if self.has_ended:
                raise PipelineError(self._ended("before it was healthy"))
            if now - started > seconds:
                self.stop()
                raise PipelineError(
                    f"{self.url}{path} did not answer within {seconds:.0f} s, and the engine was ended; see its log "
                    f"above, or set serve.engine_start_seconds higher. Its last lines:\n{self._tail()}"
                )
            if now - reported >= SAY_SECONDS:
                reported = now
                say(f"waiting for the engine's {path}: {now - started:.0f} of at most {seconds:.0f} s")
            time.sleep(POLL_SECONDS)

    def wait(self) -> int:
        """Waits for the program to end; returns its exit status, as a shell gives it (128 + a signal's number)."""
        status = self._process.wait()
        self._end_group()
        self._reader.join(KILL_SECONDS)
        return status if status >= 0 else 128 - status

    @property
    def has_ended(self) -> bool:
        """Whether the program has ended by itself or was ended."""
        return self._process.poll() is not None

    def send(self, number: int) -> None:
        """Passes a signal on to the program."""
        if not self.has_ended:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, number)

    def stop(self) -> int:
        """Ends the program and every process that it has started; returns its exit status."""
        self.send(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(KILL_SECONDS)
        self._end_group()
        return self.wait()

    def _ended(self, when: str) -> str:
        status = self.wait()
        return f"{' '.join(self._command[:3])} ... ended with {status} {when}; its last lines:\n{self._tail()}"

    def _tail(self) -> str:
        return "\n".join(f"  {line}" for line in self._last)

    def _end_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)  # the group has the number of its first process

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as output:
            for line in output:
                shown = line.rstrip("\n")
                for secret in self._secrets:
                    shown = shown.replace(secret, "***")
                self._last.append(shown)
                self._on_line(shown)


@contextlib.contextmanager
def signals_passed_to(server: LaunchedServer) -> Iterator[None]:
    """Passes SIGINT and SIGTERM on to the program; a second one ends all its processes at once."""
    received = 0

    def passed(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received += 1
        if received > 1:
            server._end_group()
        else:
            server.send(signal.SIGTERM)

    before = {number: signal.signal(number, passed) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def write_line(line: str) -> None:
    """Writes a line of the engine's log to this program's stderr."""
    print(line, file=sys.stderr, flush=True)


def version_of(python: str, package: str) -> str:
    """Returns the version of a package in an interpreter's environment.

    Raises PipelineError when the interpreter cannot be run or lacks the package.
    """
    program = f"import importlib.metadata as m; print(m.version({package!r}))"
    try:
        found = subprocess.run([python, "-c", program], capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PipelineError(f"serve.engine_python is {python}, which cannot be run: {error}") from error
    if found.returncode:
        raise PipelineError(
            f"{python} has no package {package}; install it in an environment of its own and set "
            "serve.engine_python to that environment's interpreter (docs/runtimes.md has the commands)"
        )
    return found.stdout.strip()


def unknown_flags(program: Sequence[str], help_flag: str, command: Sequence[str]) -> list[str]:
    """Returns the flags of a command that its program does not know, by the program's own help.

    Raises PipelineError when it gives none.
    """
    try:
        found = subprocess.run([*program, help_flag], capture_output=True, text=True, timeout=HELP_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PipelineError(f"{' '.join(program)} {help_flag} cannot be run: {error}") from error
    if found.returncode:
        tail = "\n  ".join(found.stderr.splitlines()[-LAST_LINES:])
        raise PipelineError(f"{' '.join(program)} {help_flag} ended with {found.returncode}:\n  {tail}")
    known = set(re.findall(r"--[\w-]+", found.stdout))
    return [word for word in command if word.startswith("--") and word not in known]


def _answers(url: str) -> bool:
    try:
        with DIRECT.open(url, timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError, ValueError):
        return False
