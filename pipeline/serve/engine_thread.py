"""Runs the engine in a thread of its own and hands its updates to asyncio."""

import asyncio
import contextlib
import dataclasses
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from pipeline.engine.request import Request, StepUpdate
from pipeline.errors import PipelineError
from pipeline.serve.served_engine import ServedEngine

log = logging.getLogger("pipeline")

BAD_GATEWAY = 502
IDLE_SECONDS = 5.0  # between two calls of `while_idle`


class Unavailable(Exception):
    """Says that the engine has failed or is shutting down, so that no answer can be finished. `status` is HTTP's."""

    def __init__(self, message: str, status: int = 503) -> None:
        super().__init__(message)
        self.status = status


class RequestStream:
    """Carries the updates of requests that were submitted together; it is used on one event loop."""

    def __init__(self, engine_thread: "EngineThread", request_ids: Sequence[str]) -> None:
        self.request_ids = tuple(request_ids)
        self._engine_thread = engine_thread
        self._open = set(request_ids)
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[StepUpdate | Exception] = asyncio.Queue()
        self._accepted: asyncio.Future[None] = self._loop.create_future()

    async def updates(self) -> AsyncIterator[StepUpdate]:
        """Yields updates as they come, until every request has finished or was cancelled; raises Unavailable."""
        while self._open:
            item = await self._items.get()
            if isinstance(item, Exception):
                self._open.clear()
                raise item
            if item.request_id not in self._open:
                continue  # cancelled meanwhile
            if item.finish_reason is not None:
                self._open.discard(item.request_id)
            yield item

    def cancel(self, request_id: str) -> None:
        """Stops generating for a request; it is no error when the request has finished."""
        if request_id in self._open:
            self._open.discard(request_id)
            self._engine_thread.send(_Cancel((request_id,)))

    def close(self) -> None:
        """Cancels what is still open."""
        for request_id in tuple(self._open):
            self.cancel(request_id)

    async def accepted(self) -> None:
        """Waits until the engine has accepted the requests; raises what it raised."""
        await self._accepted

    def settle(self, error: Exception | None) -> None:
        """Delivers, from the engine's thread, whether it accepted the requests."""
        self._call(self._settle, error)

    def put(self, item: StepUpdate | Exception) -> None:
        """Hands over, from the engine's thread, an update or the error that ends all requests."""
        self._call(self._items.put_nowait, item)

    def _settle(self, error: Exception | None) -> None:
        if self._accepted.done():  # the client went away while it waited
            return
        if error is None:
            self._accepted.set_result(None)
        else:
            self._open.clear()
            self._accepted.set_exception(error)

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(function, *arguments)


@dataclasses.dataclass(frozen=True)
class _Submit:
    requests: tuple[Request, ...]
    stream: RequestStream


@dataclasses.dataclass(frozen=True)
class _Cancel:
    request_ids: tuple[str, ...]


class _Stop:
    pass


class EngineThread:
    """Steps the engine while it has work; takes orders from any thread between steps.

    When a step raises, every request that is open or comes later gets Unavailable, and `failure` says why:
    the engine's buffers were donated to the step that failed. `while_idle` is called now and then while there is
    nothing to do.
    """

    def __init__(self, engine: ServedEngine, while_idle: Callable[[], None] | None = None) -> None:
        self.failure: str | None = None
        self._while_idle = while_idle
        self._engine = engine
        self._orders: queue.SimpleQueue[_Submit | _Cancel | _Stop] = queue.SimpleQueue()
        self._streams: dict[str, RequestStream] = {}  # of open requests; the thread's own
        self._lock = threading.Lock()  # orders are either taken by the thread or refused because it has ended
        self._ended: Unavailable | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def end(self) -> None:
        """Lets the thread end after its current step; open requests get Unavailable."""
        self.send(_Stop())

    def stop(self, timeout_seconds: float = 30.0) -> bool:
        """Ends the thread and waits for it; returns whether it ended in time."""
        self.end()
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    async def submit(self, requests: Sequence[Request]) -> RequestStream:
        """Submits requests, all or none, and returns their stream.

        Raises PipelineError when the engine refuses one, or Unavailable.
        """
        stream = RequestStream(self, [request.request_id for request in requests])
        self.send(_Submit(tuple(requests), stream))
        try:
            await stream.accepted()
        except asyncio.CancelledError:
            stream.close()
            raise
        return stream

    def send(self, order: "_Submit | _Cancel | _Stop") -> None:
        """Leaves an order for the engine's thread, from any thread."""
        with self._lock:
            if self._ended is None:
                self._orders.put(order)
                return
        if isinstance(order, _Submit):
            order.stream.settle(self._ended)

    def _run(self) -> None:
        try:
            while self._take_orders():
                if self._engine.has_work:
                    for update in self._engine.step():
                        self._deliver(update)
            reason = Unavailable("the server is shutting down; send the request again later")
        except Exception as error:  # nobody is above this frame: what is raised here must reach the clients
            log.exception("the engine has failed; /health answers 503 until the server is started again")
            self.failure = f"{type(error).__name__}: {error}"
            reason = Unavailable(f"the engine has failed ({self.failure}); restart the server", 500)
        self._finish(reason)

    def _take_orders(self) -> bool:
        """Carries out all orders, waiting for one when the engine is idle; returns False to stop."""
        while not self._orders.empty() or not self._engine.has_work:
            order = self._next_order()
            if isinstance(order, _Stop):
                return False
            if isinstance(order, _Submit):
                self._submit(order)
            else:
                for request_id in order.request_ids:
                    if self._streams.pop(request_id, None) is not None:
                        self._engine.cancel(request_id)
        return True

    def _next_order(self) -> "_Submit | _Cancel | _Stop":
        while self._while_idle is not None:
            try:
                return self._orders.get(timeout=IDLE_SECONDS)
            except queue.Empty:
                self._while_idle()
        return self._orders.get()

    def _submit(self, order: _Submit) -> None:
        self._streams |= dict.fromkeys(order.stream.request_ids, order.stream)
        try:
            self._engine.add_all(order.requests)
        except PipelineError as error:
            for request_id in order.stream.request_ids:
                del self._streams[request_id]
            order.stream.settle(error)
            return
        order.stream.settle(None)

    def _deliver(self, update: StepUpdate) -> None:
        finished = update.finish_reason is not None
        stream = self._streams.pop(update.request_id) if finished else self._streams[update.request_id]
        stream.put(update if update.failure is None else Unavailable(update.failure, BAD_GATEWAY))

    def _finish(self, reason: Unavailable) -> None:
        with self._lock:
            self._ended = Unavailable(str(reason))
        while not self._orders.empty():
            order = self._orders.get()
            if isinstance(order, _Submit):
                order.stream.settle(self._ended)
        for stream in set(self._streams.values()):
            stream.settle(reason)  # counts only when the failure came while it was being submitted
            stream.put(reason)
        self._streams.clear()
