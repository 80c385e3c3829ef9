"""Ports for programs that tests start."""

import os
import random
import socket

FIRST, NUM_PORTS = 20_000, 1_000  # below those that Linux gives away itself


def free_port() -> int:
    """A port that nobody listens on, from this process's own thousand.

    The program that gets it binds it later. So two processes of pytest-xdist draw from two ranges, and one process that
    asks again draws anew.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for port in random.SystemRandom().sample(range(NUM_PORTS), NUM_PORTS):
        with socket.socket() as listener:
            try:
                listener.bind(("", FIRST + NUM_PORTS * worker + port))
            except OSError:
                continue
            return listener.getsockname()[1]
    raise RuntimeError("no port is free")
