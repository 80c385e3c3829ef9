"""Runs a FastAPI application on a port until SIGINT or SIGTERM."""

import asyncio
import contextlib
import errno
import socket
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI

from pipeline.errors import PipelineError

GRACE_SECONDS = 5  # how long requests in flight may go on after a signal; then `cut` ends them
LAST_SECONDS = 10  # how long their last answers may take; then their connections are closed
BACKLOG = 2048  # connections that wait to be taken


def bind(host: str, port: int) -> socket.socket:
    """Takes the port (0: any free one) without answering on it yet; raises PipelineError when it cannot be had."""
    with _port_errors(host, port):
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    return listener


def url(listener: socket.socket) -> str:
    """Returns the URL at which a bound socket answers."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Uvicorn's server, which calls `cut` when requests in flight have had their grace."""

    def __init__(self, config: uvicorn.Config, cut: Callable[[], None]) -> None:
        super().__init__(config)
        self._cut = cut

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends the server, quickly when nothing is in flight."""
        timer = asyncio.get_running_loop().call_later(GRACE_SECONDS, self._cut)
        await super().shutdown(sockets)
        timer.cancel()


def create_server(app: FastAPI, listener: socket.socket, *, cut: Callable[[], None]) -> Server:
    """Returns a server for `app` and opens its port: clients are no longer turned away. `cut` must not block."""
    host, port = listener.getsockname()[:2]
    with _port_errors(host, port):
        listener.listen(BACKLOG)  # fails when another server took the port meanwhile
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=GRACE_SECONDS + LAST_SECONDS,
    )
    return Server(config, cut)


def serve(server: Server, listener: socket.socket) -> None:
    """Answers requests until `server.should_exit`, SIGINT or SIGTERM; requests in flight get some seconds."""
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises the signal again once it has ended
        server.run(sockets=[listener])


@contextlib.contextmanager
def _port_errors(host: str, port: int) -> Iterator[None]:
    try:
        yield
    except (OSError, OverflowError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise PipelineError(
                f"serve.port is {port}, which is in use on {host}; end the server there or set serve.port to "
                "another (0: any free one)"
            ) from error
        raise PipelineError(
            f"serve.host is {host!r} and serve.port {port}: {error}; set them to an address of this machine"
        ) from error
