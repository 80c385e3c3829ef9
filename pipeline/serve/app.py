"""The server's application: routes, keys, request ids, one line of log a request, and errors in OpenAI's shape."""

import collections
import logging
import re
import secrets
import time
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Security
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from pipeline.serve.api import Api
from pipeline.serve.auth import DOCS_FILES, ApiKeys
from pipeline.serve.engine_thread import Unavailable
from pipeline.serve.errors import ApiError
from pipeline.serve.generation import unavailable
from pipeline.serve.page import page
from pipeline.serve.schema.chat import ChatBody
from pipeline.serve.schema.completion import CompletionBody
from pipeline.serve.schema.responses import ResponseBody
from pipeline.serve.schema.tokens import DetokenizeBody, TokenizeBody

log = logging.getLogger("pipeline.serve")

REQUEST_ID = "x-request-id"
USABLE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")  # of a client's, which comes back in a header and stands in the log
RETRY_SECONDS = 1
PLAIN = "/plain"  # where the target alone answers


def create_app(
    api: Api,
    *,
    keys: ApiKeys,
    plain: Api | None = None,
    cors_origins: Sequence[str] = (),
    logs_requests: bool = False,
) -> FastAPI:
    """Returns the application; the API's description is at /openapi.json and /docs.

    Under /plain it answers everything with the target alone, where there is an engine for that.
    """
    app = _routes(api, needs_key=len(keys) > 0)

    async def index() -> Response:
        return page(compares=plain is not None)

    app.add_api_route("/", index, methods=["GET", "HEAD"], include_in_schema=False)
    if plain is not None:
        app.mount(PLAIN, _routes(plain, needs_key=len(keys) > 0))
    most = api.limits.max_requests_per_key
    app.add_middleware(_Gate, keys=keys, max_requests_per_key=most, logs_requests=logs_requests)
    if cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(cors_origins), allow_methods=["*"], allow_headers=["*"])
    return app


def _routes(api: Api, *, needs_key: bool) -> FastAPI:
    # the page at /docs then has a field for the key, which _Gate checks
    asks = [Security(HTTPBearer(auto_error=False))] if needs_key else []
    # the page at /docs loads its script from this server instead of a content delivery network
    app = FastAPIOffline(
        title=f"{api.served.name}, DFLASH", redoc_url=None, static_url=DOCS_FILES.rstrip("/"), dependencies=asks
    )
    for path, endpoint, body in (
        ("/v1/completions", api.completions, CompletionBody),
        ("/v1/chat/completions", api.chat, ChatBody),
        ("/v1/responses", api.create_response, ResponseBody),
        ("/tokenize", api.tokenize, TokenizeBody),
        ("/detokenize", api.detokenize, DetokenizeBody),
    ):
        app.post(path, response_model=None, openapi_extra=_described(body, api.served.name))(endpoint)
    for path, answer in (
        ("/v1/models", api.models),
        ("/v1/models/{name:path}", api.retrieve_model),
        ("/v1/responses/{name}", api.stored_response),
        ("/health", api.health),
        ("/ready", api.ready),
        ("/metrics", api.metrics),
    ):
        app.get(path, response_model=None)(answer)
        app.head(path, response_model=None, include_in_schema=False)(answer)
    app.delete("/v1/responses/{name}", response_model=None)(api.delete_response)
    _answer_errors(app, api)
    return app


def _described(body: type[BaseModel], served: str) -> dict[str, Any]:
    """Returns what the API's description says of a body, which the endpoint reads itself and whose model is known."""
    schema = _inlined(body.model_json_schema())
    schema["properties"]["model"] = {"const": served}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """Returns a schema with its definitions in the places that refer to them."""
    definitions = schema.pop("$defs", {})

    def resolved(value: Any) -> Any:
        if isinstance(value, dict):
            if "$ref" in value:
                return resolved(definitions[value["$ref"].rpartition("/")[2]])
            return {key: resolved(item) for key, item in value.items()}
        return [resolved(item) for item in value] if isinstance(value, list) else value

    found = resolved(schema)
    assert isinstance(found, dict), "a schema is an object"
    return found


def _answer_errors(app: FastAPI, api: Api) -> None:
    def reply(error: ApiError) -> JSONResponse:
        headers = {"Retry-After": str(RETRY_SECONDS)} if error.status in (429, 503) else None
        return JSONResponse(error.body, error.status, headers)

    @app.exception_handler(ApiError)
    async def refused(http: HttpRequest, error: ApiError) -> JSONResponse:
        if http.method == "POST":
            api.counters.requests["refused" if error.status < 500 else "failed"] += 1
        return reply(error)

    @app.exception_handler(Unavailable)
    async def not_available(http: HttpRequest, error: Unavailable) -> JSONResponse:
        return reply(unavailable(error))

    @app.exception_handler(HTTPException)
    async def no_route(http: HttpRequest, error: HTTPException) -> JSONResponse:
        posts = "POST /v1/completions, POST /v1/chat/completions, POST /v1/responses"
        routes = f"{posts}, GET /v1/models, GET /health, GET /metrics, GET /docs"
        message = f"{http.method} {http.url.path}: {error.detail}; served: {routes}"
        return JSONResponse(ApiError(message).body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def broken(http: HttpRequest, error: Exception) -> JSONResponse:
        # Starlette raises the error again behind this reply, so that the log has its traceback
        message = f"{type(error).__name__} in the server; its log has the traceback"
        return JSONResponse(ApiError(message, kind="server_error").body, 500)


class _Gate:
    """Asks for a key, of which few requests may run, names every request, and logs it without its content."""

    def __init__(self, app: Any, *, keys: ApiKeys, max_requests_per_key: int | None, logs_requests: bool) -> None:
        self._app, self._keys, self._logs_requests = app, keys, logs_requests
        self._max_requests_per_key = max_requests_per_key
        self._running: collections.Counter[int] = collections.Counter()  # requests by the number of their key

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handles one request (ASGI's entry)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, started, status = Headers(scope=scope), time.monotonic(), 0
        asked = headers.get(REQUEST_ID, "")
        name = asked if USABLE_ID.fullmatch(asked) else secrets.token_hex(12)

        async def named(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = name
            await send(message)

        key = None
        try:
            key = self._keys.check(scope["path"], headers)
            self._begin(key)
        except ApiError as error:
            more = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {"Retry-After": str(RETRY_SECONDS)}
            await JSONResponse(error.body, error.status, more)(scope, receive, named)
        else:
            try:
                await self._app(scope, receive, named)
            finally:
                self._running.subtract([] if key is None else [key])
        finally:
            if self._logs_requests:
                seconds = time.monotonic() - started
                log.info("%s %s %d %.3f s %s", scope["method"], ascii(scope["path"])[1:-1], status, seconds, name)

    def _begin(self, key: int | None) -> None:
        """Counts a request; raises ApiError when its key has as many as it may."""
        if key is None:
            return
        most = self._max_requests_per_key
        if most is not None and self._running[key] >= most:
            raise ApiError(
                f"the key has {most} requests already, as many as this server allows at a time; send it again later",
                code="rate_limit_exceeded",
                status=429,
                kind="rate_limit_error",
            )
        self._running[key] += 1
