"""Runs a FastAPI application on a port until SIGINT or SIGTERM, which let it finish what it has begun."""

import asyncio
import contextlib
import errno
import logging
import socket
import time
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from pipeline.errors import PipelineError
from pipeline.serve.http_protocol import protocol_with
from pipeline.serve.limits import DEFAULT, Limits

log = logging.getLogger("pipeline")

GRACE_SECONDS = 5.0  # how long requests in flight may go on once the server is to end; then `cut` ends them
LAST_SECONDS = 10  # how long their last answers may take; then their connections are closed
BACKLOG = 2048  # connections that wait to be taken
KEEP_ALIVE_SECONDS = 75  # nginx's; where a client reuses an idle connection for longer than that, requests are lost


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


def url(listener: socket.socket, *, scheme: str = "http") -> str:
    """Returns the URL at which a bound socket answers."""
    return address(*listener.getsockname()[:2], scheme=scheme)


def address(host: str, port: int, *, scheme: str = "http") -> str:
    """Returns the URL of a host and port."""
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def free_port(host: str, port: int) -> int:
    """Returns the port (0: any free one) when nothing has it; raises PipelineError when it cannot be had."""
    with contextlib.closing(bind(host, port)) as listener:
        return int(listener.getsockname()[1])


class Server(uvicorn.Server):
    """Uvicorn's server, which finishes what it has begun: a signal starts to drain it, and a second one ends it.

    `on_drain` is called at the first signal, when requests are to be refused; those in flight have `drain_seconds`.
    `cut` ends those that are left.
    """

    def __init__(
        self, config: uvicorn.Config, cut: Callable[[], None], on_drain: Callable[[], None], drain_seconds: float
    ) -> None:
        super().__init__(config)
        self._cut, self._on_drain, self._drain_seconds = cut, on_drain, drain_seconds
        self._drains_until: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Takes a signal: the first one begins to drain, the next one ends at once."""
        self._captured_signals.append(sig)
        if self._drains_until is not None or self.should_exit:
            self.should_exit = self.force_exit = True
            self._cut()
            return
        self._drains_until = time.monotonic() + self._drain_seconds
        self._on_drain()

    async def on_tick(self, counter: int) -> bool:
        """Returns, ten times a second, whether the server is to end."""
        if self._drains_until is not None and not self.should_exit:
            is_over = time.monotonic() >= self._drains_until
            if is_over or not self.server_state.tasks:
                self.should_exit = True
                if is_over:
                    self._cut()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends the server, quickly when nothing is in flight."""
        timer = asyncio.get_running_loop().call_later(GRACE_SECONDS, self._cut)
        await super().shutdown(sockets)
        timer.cancel()


def create_server(
    app: FastAPI,
    listener: socket.socket,
    *,
    cut: Callable[[], None],
    limits: Limits = DEFAULT,
    on_drain: Callable[[], None] = lambda: None,
    drain_seconds: float = GRACE_SECONDS,
    certificate: tuple[str, str] | None = None,
) -> Server:
    """Returns a server for `app` and opens its port: clients are no longer turned away. `cut` must not block.

    With a `certificate`, two files (the chain and its key), it speaks TLS. Raises PipelineError when they are no pair.
    """
    host, port = listener.getsockname()[:2]
    with _port_errors(host, port):
        listener.listen(BACKLOG)  # fails when another server took the port meanwhile
    chain, key = certificate or (None, None)
    config = uvicorn.Config(
        app,
        http=protocol_with(limits),
        ws="none",
        log_config=None,
        log_level="warning",
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(GRACE_SECONDS + LAST_SECONDS),
        ssl_certfile=chain,
        ssl_keyfile=key,
    )
    try:
        config.load()
    except OSError as error:  # ssl's errors are OSErrors
        raise PipelineError(
            f"serve.tls_certificate is {chain} and serve.tls_key {key}: {error}; name the files of a certificate chain "
            "and of its key, in PEM"
        ) from error
    return Server(config, cut, on_drain, drain_seconds)


def serve(server: Server, listener: socket.socket) -> None:
    """Answers requests until `server.should_exit`, SIGINT or SIGTERM, and then those in flight."""
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
