"""Serves OpenAI's HTTP endpoints with an engine's thread. The default temperature is 0."""

import asyncio
import contextlib
import dataclasses
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from pipeline.engine.engine import Engine
from pipeline.engine.request import Request
from pipeline.errors import PipelineError
from pipeline.prompts.chat_format import chat_format_of, render_prompt
from pipeline.prompts.tokenizer import Tokenizer
from pipeline.prompts.tools import tools_problem
from pipeline.serve import metrics, schema
from pipeline.serve.answer import Answer, usage
from pipeline.serve.engine_thread import EngineThread, RequestStream, Unavailable
from pipeline.serve.errors import ApiError
from pipeline.serve.responses import ChatResponses, CompletionResponses, Responses
from pipeline.serve.sampling_fields import key_of
from pipeline.serve.text_stream import FINAL, TEXT, PlainReader, TextChannel, chat_reader

CLIENT_CLOSED_REQUEST = 499  # nginx's; nobody is left to read it


class Generation:
    """Holds one HTTP request's generations, one per prompt, all accepted by the engine."""

    def __init__(
        self, stream: RequestStream, answers: Sequence[Answer], responses: Responses, counters: metrics.Counters
    ) -> None:
        self.responses = responses
        self.answers = answers
        self._stream = stream
        self._index = {request_id: index for index, request_id in enumerate(stream.request_ids)}
        self._counters = counters
        counters.prompt_tokens += sum(answer.prompt_tokens for answer in answers)
        self._lost = "cancelled"  # what became of answers that are not finished

    async def pieces(self) -> AsyncIterator[tuple[int, list[tuple[TextChannel, str]]]]:
        """Yields the index of an answer and its new text, until all are finished; raises Unavailable."""
        try:
            async for update in self._stream.updates():
                index = self._index[update.request_id]
                answer = self.answers[index]
                before = len(answer.token_ids)
                new = answer.take(update)
                self._counters.generated_tokens += len(answer.token_ids) - before
                if answer.finish_reason is not None:
                    self._counters.requests[answer.finish_reason] += 1
                    self._stream.cancel(update.request_id)  # a stop string ends it before the engine does
                yield index, new
        except Unavailable:
            self._lost = "failed"
            raise

    async def whole(self) -> dict[str, Any]:
        """Returns the reply to a request that does not stream."""
        async for _ in self.pieces():
            pass
        return self.responses.whole(self.answers)

    async def events(self, *, with_usage: bool) -> AsyncIterator[str]:
        """Yields the reply as server-sent events; a failure on the way is an error event."""
        for chunk in self.responses.opening(len(self.answers)):
            yield _event(chunk)
        try:
            async for index, new in self.pieces():
                answer = self.answers[index]
                for chunk in self.responses.chunks(index, new, answer):
                    yield _event({**chunk, "usage": None} if with_usage else chunk)
        except Unavailable as error:
            yield _event(_unavailable(error).body)
            return
        if with_usage:
            yield _event({**self.responses.chunk([]), "usage": usage(self.answers)})
        yield "data: [DONE]\n\n"

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


class Api:
    """Answers the endpoints for one served model; `date` None is today, for templates that print the date."""

    def __init__(
        self,
        engine_thread: EngineThread,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        model: str,
        effort: str,
        date: str | None = None,
    ) -> None:
        self.model = model
        self.counters = metrics.Counters()
        self.engine = engine  # its sizes and counters are read here; its own thread alone runs it
        self.engine_thread = engine_thread
        self._tokenizer = tokenizer
        self._effort = effort
        self._date = date
        self._created = int(time.time())

    async def completions(self, http: HttpRequest) -> Response:
        """Answers POST /v1/completions: text or tokens are continued as they are."""
        body = schema.read_completion(await _body(http), self.model, self.engine.config.stop_token_ids)
        prompts = [
            prompt if isinstance(prompt, tuple) else tuple(self._tokenizer.encode(prompt, add_special_tokens=False))
            for prompt in body.prompts
        ]
        responses = CompletionResponses(f"cmpl-{secrets.token_hex(12)}", self.model, body.return_token_ids)
        return await self._answer(http, body, prompts, responses)

    async def chat(self, http: HttpRequest) -> Response:
        """Answers POST /v1/chat/completions: messages in the target's chat format; its channels come apart."""
        body = schema.read_chat(await _body(http), self.model, self.engine.config.stop_token_ids)
        self._refuse_unknown(body)
        try:
            effort = body.effort or self._effort
            prompt = render_prompt(self._tokenizer, body.messages, effort, tools=body.tools, date=self._date)
        except PipelineError as error:
            raise ApiError(str(error), param="messages") from error
        token_ids = prompt if body.return_token_ids else None
        responses = ChatResponses(f"chatcmpl-{secrets.token_hex(12)}", self.model, token_ids)
        return await self._answer(http, body, [tuple(prompt)], responses)

    def models(self) -> dict[str, Any]:
        """Answers GET /v1/models."""
        return {"object": "list", "data": [self._model()]}

    def retrieve_model(self, name: str) -> dict[str, Any]:
        """Answers GET /v1/models/{name}."""
        if name != self.model:
            raise ApiError(
                f"the model {name!r} is not served here; served: {self.model!r}",
                param="model",
                code="model_not_found",
                status=404,
            )
        return self._model()

    def health(self) -> JSONResponse:
        """Answers GET /health: 200 while the engine runs, 503 with the reason once it has failed."""
        if self.engine_thread.failure is not None:
            return JSONResponse({"status": "failed", "reason": self.engine_thread.failure}, 503)
        return JSONResponse({"status": "ok"})

    def metrics(self) -> PlainTextResponse:
        """Answers GET /metrics."""
        text = metrics.exposition(self.counters, self.engine, healthy=self.engine_thread.failure is None)
        return PlainTextResponse(text, media_type=metrics.CONTENT_TYPE)

    def _refuse_unknown(self, body: schema.ChatBody) -> None:
        """Raises ApiError for what the target's chat format does not know, and for tools that are malformed."""
        chat_format = chat_format_of(self._tokenizer)
        if body.effort is not None and not chat_format.has_efforts:
            raise ApiError(f"{self.model} knows no reasoning efforts: leave it out", param="reasoning_effort")
        if body.tools and not chat_format.has_tools:
            raise ApiError(f"{self.model} knows no tools: leave them out", param="tools")
        problem = tools_problem(body.tools)
        if problem is not None:
            raise ApiError(problem, param="tools")

    async def _answer(
        self,
        http: HttpRequest,
        body: schema.CompletionBody | schema.ChatBody,
        prompts: list[tuple[int, ...]],
        responses: Responses,
    ) -> Response:
        requests = [
            Request(
                request_id=f"{responses.reply_id}-{index}",
                prompt_ids=prompt,
                max_new_tokens=self._room(prompt, body.max_tokens, responses.prompt_param),
                sampling=dataclasses.replace(body.sampling, key=key_of(body.seed, index)),
            )
            for index, prompt in enumerate(prompts)
        ]
        try:
            stream = await self.engine_thread.submit(requests)
        except PipelineError as error:
            raise ApiError(str(error), param=responses.prompt_param) from error
        except Unavailable as error:
            raise _unavailable(error) from error
        chat = isinstance(body, schema.ChatBody)
        answers = [
            Answer(
                chat_reader(self._tokenizer) if chat else PlainReader(self._tokenizer, TEXT),
                stop=body.stop,
                stop_channel=FINAL if chat else TEXT,
                prompt_tokens=len(prompt),
                has_draft=self.engine.block_size is not None,
            )
            for prompt in prompts
        ]
        call = Generation(stream, answers, responses, self.counters)
        if body.stream:
            return EventStream(call.events(with_usage=body.stream_usage), closed=call.close)
        return await _while_connected(http, call)

    def _room(self, prompt: tuple[int, ...], max_tokens: int | None, param: str) -> int:
        """Returns how many tokens to generate; raises ApiError when the engine has no room for them."""
        wanted = 1 if max_tokens is None else max_tokens
        if len(prompt) + wanted > self.engine.config.max_length:
            more = "at least one more is" if max_tokens is None else f"{max_tokens} more are"
            raise ApiError(
                f"the prompt has {len(prompt)} tokens and {more} wanted, {len(prompt) + wanted} in all; this server's "
                f"context is {self.engine.config.max_length} tokens: shorten the prompt, lower max_tokens, or start "
                "the server with a larger engine.max_length",
                param=param,
                code="context_length_exceeded",
            )
        return self.engine.config.max_length - len(prompt) if max_tokens is None else max_tokens

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.model,
            "object": "model",
            "created": self._created,
            "owned_by": "pipeline",
            "max_model_len": self.engine.config.max_length,
        }


def create_app(api: Api) -> FastAPI:
    """Returns the application: the routes, and every error in OpenAI's shape."""
    app = FastAPI(title=f"{api.model}, DFLASH", docs_url=None, redoc_url=None, openapi_url=None)
    app.post("/v1/completions", response_model=None)(api.completions)
    app.post("/v1/chat/completions", response_model=None)(api.chat)
    app.get("/v1/models")(api.models)
    app.get("/v1/models/{name:path}")(api.retrieve_model)
    app.get("/health", response_model=None)(api.health)
    app.get("/metrics", response_model=None)(api.metrics)

    @app.exception_handler(ApiError)
    async def refused(http: HttpRequest, error: ApiError) -> JSONResponse:
        if http.method == "POST":
            api.counters.requests["refused" if error.status < 500 else "failed"] += 1
        return JSONResponse(error.body, error.status)

    @app.exception_handler(Unavailable)
    async def unavailable(http: HttpRequest, error: Unavailable) -> JSONResponse:
        answer = _unavailable(error)
        return JSONResponse(answer.body, answer.status)

    @app.exception_handler(HTTPException)
    async def no_route(http: HttpRequest, error: HTTPException) -> JSONResponse:
        routes = "POST /v1/completions, POST /v1/chat/completions, GET /v1/models, GET /health, GET /metrics"
        message = f"{http.method} {http.url.path}: {error.detail}; served: {routes}"
        return JSONResponse(ApiError(message).body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def broken(http: HttpRequest, error: Exception) -> JSONResponse:
        # Starlette raises the error again behind this reply, so that the log has its traceback
        message = f"{type(error).__name__} in the server; its log has the traceback"
        return JSONResponse(ApiError(message, kind="server_error").body, 500)

    return app


async def _body(http: HttpRequest) -> Any:
    try:
        return json.loads(await http.body())
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is not JSON ({error}); send a JSON object") from error


async def _while_connected(http: HttpRequest, call: Generation) -> Response:
    """Returns the whole reply, or ends the generation when the client goes away."""
    done, gone = asyncio.create_task(call.whole()), asyncio.create_task(_disconnected(http))
    try:
        await asyncio.wait({done, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        return JSONResponse(done.result())
    finally:
        for task in (done, gone):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Unavailable):
                await task
        call.close()


async def _disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _unavailable(error: Unavailable) -> ApiError:
    return ApiError(str(error), code="engine_unavailable", status=error.status, kind="server_error")


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n"
