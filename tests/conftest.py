"""What every test stands on: the CPU, no network, no token, and shapes checked where they are written."""

import os
import signal
import socket

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a job in the background, whose children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from jaxtyping import install_import_hook  # after the variables, which JAX reads when it is imported

install_import_hook("pipeline", "beartype.beartype")

# fixtures of several folders after the hook, which they must not escape
pytest_plugins = [f"tests.support.{name}" for name in ("compiled", "cached", "timing", "once", "groups")]


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """Refuse connections that leave this machine."""
    connect = socket.socket.connect

    def refuse(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in (
            "127.0.0.1",
            "::1",
            "localhost",
        ):
            raise AssertionError(f"a test connects to {address}; tests need no network")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(autouse=True)
def _no_token(monkeypatch):
    """Keep the developer's own Hugging Face token out of the tests."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
