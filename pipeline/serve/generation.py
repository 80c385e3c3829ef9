"""One HTTP request's answers on their way: from the engine's updates to a reply, whole or streamed."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi.responses import StreamingResponse

from pipeline.engine.request import StepUpdate
from pipeline.serve import metrics
from pipeline.serve.answer import Answer, usage
from pipeline.serve.engine_thread import RequestStream, Unavailable
from pipeline.serve.errors import ApiError
from pipeline.serve.response_objects import ResponseObjects
from pipeline.serve.responses import ChunkEvents, Responses
from pipeline.serve.text_stream import TextChannel

Events = ChunkEvents | ResponseObjects


class Generation:
    """Holds one HTTP request's answers, all accepted by the engine; each prompt has as many as the other ones.

    They have `seconds` to be finished, None for as many as it takes.
    """

    def __init__(
        self,
        stream: RequestStream,
        answers: Sequence[Answer],
        prompts: Sequence[Sequence[int]],
        responses: Responses | ResponseObjects,
        counters: metrics.Counters,
        seconds: float | None = None,
    ) -> None:
        self.answers = answers
        self._responses = responses
        self._prompts = prompts
        self._stream = stream
        self._index = {request_id: index for index, request_id in enumerate(stream.request_ids)}
        self._counters = counters
        self._seconds = seconds
        self._started = time.monotonic()
        self._last_update = [0.0] * len(answers)
        self._reused: list[int] = [0] * len(answers)
        counters.prompt_tokens += self._prompt_tokens
        self._lost = "cancelled"  # what became of answers that are not finished

    @property
    def _prompt_tokens(self) -> int:
        return sum(map(len, self._prompts))

    def usage(self) -> dict[str, Any]:
        """Returns OpenAI's usage object, of what was generated so far; each prompt counts once."""
        each = len(self.answers) // len(self._prompts)
        cached = sum(min(self._reused[start : start + each]) for start in range(0, len(self.answers), each))
        return usage(self.answers, self._prompt_tokens, cached)

    async def pieces(self) -> AsyncIterator[tuple[int, list[tuple[TextChannel, str]]]]:
        """Yields the index of an answer and its new text, until all are finished; raises Unavailable."""
        try:
            async for update in self._updates():
                index = self._index[update.request_id]
                answer = self.answers[index]
                before = len(answer.token_ids)
                new = answer.take(update)
                self._reused[index] = update.num_reused
                self._count(index, len(answer.token_ids) - before)
                if answer.finish_reason is not None:
                    self._stream.cancel(update.request_id)  # a stop string ends it before the engine does
                yield index, new
        except Unavailable:
            self._lost = "failed"
            raise

    async def _updates(self) -> AsyncIterator[StepUpdate]:
        """Yields the engine's updates; raises Unavailable when the answers take too long."""
        updates = self._stream.updates()
        while True:
            left = None if self._seconds is None else self._started + self._seconds - time.monotonic()
            try:
                yield await (anext(updates) if left is None else asyncio.wait_for(anext(updates), max(left, 0)))
            except StopAsyncIteration:
                return
            except TimeoutError:
                message = f"the answer took longer than the {self._seconds:g} s that this server allows; ask for less"
                raise Unavailable(message, 408) from None

    def _count(self, index: int, num_new: int) -> None:
        now, counters, answer = time.monotonic(), self._counters, self.answers[index]
        counters.generated_tokens += num_new
        if self._last_update[index]:
            counters.inter_token_seconds.observe(now - self._last_update[index])
        else:
            counters.first_token_seconds.observe(now - self._started)
        self._last_update[index] = now
        if answer.finish_reason is not None:
            counters.requests[answer.finish_reason] += 1
            counters.request_seconds.observe(now - self._started)

    async def whole(self) -> dict[str, Any]:
        """Returns the reply to a request that does not stream."""
        async for _ in self.pieces():
            pass
        return self._responses.whole(self.answers, self.usage())

    async def events(self, events: Events) -> AsyncIterator[str]:
        """Yields the reply as server-sent events; a failure on the way is an error event."""
        for event in events.opening(len(self.answers), self.usage):
            yield event
        try:
            async for index, new in self.pieces():
                for event in events.chunks(index, new, self.answers[index], self.usage):
                    yield event
        except Unavailable as error:
            yield events.failed(unavailable(error))
            return
        for event in events.closing(self.answers, self.usage()):
            yield event

    def close(self) -> None:
        """Cancels what is still being generated; called once, however the request ends."""
        self._stream.close()
        self._counters.requests[self._lost] += sum(answer.finish_reason is None for answer in self.answers)


class EventStream(StreamingResponse):
    """Sends server-sent events and calls `closed` when the response is over: sent, broken off or abandoned."""

    def __init__(self, events: AsyncIterator[str], *, closed: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._closed = closed

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Sends the response (ASGI's entry)."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._closed()


def unavailable(error: Unavailable) -> ApiError:
    """Returns what a client is answered when the engine cannot answer."""
    code = "request_timeout" if error.status == 408 else "engine_unavailable"
    return ApiError(str(error), code=code, status=error.status, kind="server_error")
