"""Buckets on this machine, served by emulators of Amazon's and Google's services, for tests."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

BUCKET = "a-bucket"
START_SECONDS = 60
# the interpreter that has the emulators, where the tests' own has not
PYTHON = os.environ.get("EMULATORS_PYTHON", sys.executable)


@contextlib.contextmanager
def s3() -> Iterator[tuple[str, dict[str, str]]]:
    """A bucket's URL, and the environment that leads there."""
    port = _free_port()
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
    port = _free_port()
    command = ["-m", "gcp_storage_emulator", "start", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--in-memory", "--default-bucket", BUCKET]
    with _serving(command, f"http://127.0.0.1:{port}/"):
        endpoint = f"http://127.0.0.1:{port}"
        yield f"gs://{BUCKET}", {"TENSORSTORE_GCS_HTTP_URL": endpoint, "GOOGLE_AUTH_TOKEN_FOR_TESTING": "of-a-test"}


EMULATORS = {"s3": s3, "gs": gcs}


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


def _request(url: str, method: str) -> None:
    with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=10):
        pass


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]
