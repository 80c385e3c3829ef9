"""Uvicorn's protocol for clients that send too much, too slowly, or do not read what they are sent."""

import asyncio
import contextlib
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from pipeline.serve.errors import ApiError
from pipeline.serve.limits import Limits


class LimitedProtocol(HttpToolsProtocol):
    """One connection of a server with limits; what exceeds them is answered where it can be, and closed.

    A class of its own for each server: `protocol_with`.
    """

    limits: Limits
    _timers: dict[str, asyncio.TimerHandle]
    _num_header_bytes = 0
    _is_refused = False

    def connection_made(self, transport: Any) -> None:
        """Begins a connection (asyncio's callback)."""
        super().connection_made(transport)
        self._timers = {}
        if len(self.connections) > self.limits.max_connections:
            text = (
                f"there are {len(self.connections)} connections open; this server allows {self.limits.max_connections}"
            )
            self._refuse(503, f"{text}: try again later")
            return
        self._wait_for("headers")

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends a connection (asyncio's callback)."""
        for name in list(self._timers):
            self._stop_waiting(name)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Reads what a client sends (asyncio's callback)."""
        if self._is_refused:
            return
        if self._is_waiting("headers"):
            self._num_header_bytes += len(data)
        super().data_received(data)
        if self._is_waiting("headers") and self._num_header_bytes > self.limits.max_header_bytes:
            self._refuse(431, f"the headers have more than {self.limits.max_header_bytes} bytes; send fewer")

    def on_message_begin(self) -> None:
        """Begins a request (the parser's callback)."""
        super().on_message_begin()
        self._wait_for("headers")

    def on_headers_complete(self) -> None:
        """Has all headers of a request (the parser's callback)."""
        self._stop_waiting("headers")
        self._num_header_bytes = 0
        size = sum(len(name) + len(value) for name, value in self.headers) + len(self.url)
        if size > self.limits.max_header_bytes:
            self._refuse(431, f"the headers have {size} bytes; this server reads {self.limits.max_header_bytes}")
            return
        self._wait_for("body")
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Has a part of a body (the parser's callback)."""
        if not self._is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Has a whole request (the parser's callback)."""
        self._stop_waiting("body")
        if not self._is_refused:
            super().on_message_complete()

    def pause_writing(self) -> None:
        """Learns that a client does not read as fast as it is written to (asyncio's callback)."""
        super().pause_writing()
        self._wait_for("reader")

    def resume_writing(self) -> None:
        """Learns that a client has read (asyncio's callback)."""
        self._stop_waiting("reader")
        super().resume_writing()

    def _wait_for(self, name: str) -> None:
        self._stop_waiting(name)
        self._timers[name] = self.loop.call_later(self.limits.client_seconds, self._run_out, name)

    def _is_waiting(self, name: str) -> bool:
        return name in self._timers

    def _stop_waiting(self, name: str) -> None:
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()

    def _run_out(self, name: str) -> None:
        """Ends a connection whose client took too long."""
        self._timers.pop(name, None)
        cycle = self.cycle
        is_answering = cycle is not None and cycle.response_started and not cycle.response_complete
        is_answered = name == "body" and cycle is not None and cycle.response_started
        if name == "reader" or is_answering or is_answered:
            self.transport.abort()
            return
        self._refuse(408, f"the request's {name} did not come within {self.limits.client_seconds:g} seconds")

    def _refuse(self, status: int, message: str) -> None:
        self._is_refused = True
        for name in list(self._timers):
            self._stop_waiting(name)
        if self.transport.is_closing():
            return
        content = json.dumps(ApiError(message).body).encode()
        headers = f"content-type: application/json\r\ncontent-length: {len(content)}\r\nconnection: close\r\n\r\n"
        with contextlib.suppress(OSError, RuntimeError):
            self.transport.write(STATUS_LINE[status] + headers.encode() + content)
        self.transport.close()


def protocol_with(limits: Limits) -> type[LimitedProtocol]:
    """Returns the protocol of a server with these limits."""
    members: dict[str, Any] = {"limits": limits}
    return type("LimitedProtocol", (LimitedProtocol,), members)
