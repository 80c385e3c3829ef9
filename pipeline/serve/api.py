"""Answers OpenAI's HTTP endpoints with an engine's thread."""

import asyncio
import contextlib
import dataclasses
import secrets
import time
from collections.abc import Sequence
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from pipeline.engine.request import Request
from pipeline.errors import PipelineError
from pipeline.model.layers.sampling import sampling_key
from pipeline.prompts.tokenizer import Tokenizer
from pipeline.serve import metrics
from pipeline.serve.answer import Answer
from pipeline.serve.channel_reader import chat_reader
from pipeline.serve.engine_thread import EngineThread, Unavailable
from pipeline.serve.errors import ApiError
from pipeline.serve.generation import Events, EventStream, Generation, unavailable
from pipeline.serve.grammars import CompiledGrammar, Grammars
from pipeline.serve.limits import DEFAULT, Limits
from pipeline.serve.request_reader import CLIENT_CLOSED_REQUEST, RequestReader, ServedModel, read_json
from pipeline.serve.response_objects import ResponseObjects
from pipeline.serve.response_store import ResponseStore
from pipeline.serve.responses import ChatResponses, ChunkEvents, CompletionResponses, Responses
from pipeline.serve.schema.chat import ChatBody, read_chat
from pipeline.serve.schema.completion import CompletionBody, read_completion
from pipeline.serve.schema.responses import ResponseBody, read_response
from pipeline.serve.schema.tokens import read_detokenize, read_tokenize
from pipeline.serve.served_engine import ServedEngine
from pipeline.serve.text_stream import FINAL, TEXT, PlainReader, decoded


class Api:
    """Answers the endpoints for one served model, in the event loop: FastAPI would run plain functions in threads."""

    def __init__(
        self,
        engine_thread: EngineThread,
        engine: ServedEngine,
        tokenizer: Tokenizer,
        served: ServedModel,
        limits: Limits = DEFAULT,
    ) -> None:
        self.served = served
        self.limits = limits
        self.counters = metrics.Counters()
        self.engine = engine  # its sizes and counters are read here; its own thread alone runs it
        self.engine_thread = engine_thread
        self.is_draining = False  # no request is taken any more, and those that run are finished
        self._tokenizer = tokenizer
        self._created = int(time.time())
        self._stored = ResponseStore(limits.max_stored_bytes)
        grammars = Grammars(tokenizer, engine.vocab_size)
        self._reader = RequestReader(
            tokenizer,
            served,
            grammars,
            max_body_bytes=limits.max_body_bytes,
            max_length=engine.config.max_length,
        )

    async def completions(self, http: HttpRequest) -> Response:
        """Answers POST /v1/completions: text or tokens are continued as they are."""
        self._require_open()
        content = await self._reader.content(http)

        def read() -> tuple[CompletionBody, list[tuple[int, ...]]]:
            body = read_completion(read_json(content), self.served.name)
            return body, [self._reader.encoded(prompt, body.add_special_tokens) for prompt in body.prompt]

        body, prompts = await self._reader.in_turn(len(content), read)
        echoed: list[str] = []
        if body.echo:
            texts = [
                prompt if isinstance(prompt, str) else decoded(self._tokenizer, prompt, skip_special_tokens=True)
                for prompt in body.prompt
            ]
            echoed = [text for text in texts for _ in range(body.n)]
        responses = CompletionResponses(
            f"cmpl-{secrets.token_hex(12)}",
            self.served.name,
            self._tokenizer,
            token_ids=body.return_token_ids,
            log_probs=body.logprobs is not None,
            echoed=echoed,
            prompts=[prompt for prompt in prompts for _ in range(body.n)],
        )
        answers = [
            Answer(
                PlainReader(self._tokenizer, TEXT, skips_special=body.skip_special_tokens),
                content_channel=TEXT,
                stop=body.stop,
                ignores_end=body.ignore_eos,
                has_draft=self.engine.block_size is not None,
                prompt_alone=body.max_tokens == 0,
            )
            for _ in range(len(prompts) * body.n)
        ]
        grammar = await asyncio.to_thread(self._reader.text_grammar, body) if body.form is not None else None
        limit = body.max_tokens
        if limit == 0 and body.logprobs is not None:
            limit = 1  # the prompt is computed for its log probabilities
        return await self._answer(http, body, prompts, limit, answers, responses, grammar)

    async def chat(self, http: HttpRequest) -> Response:
        """Answers POST /v1/chat/completions: messages in the target's chat format; its channels come apart."""
        self._require_open()
        content = await self._reader.content(http)

        def read() -> tuple[ChatBody, list[int], list[int]]:
            body = read_chat(read_json(content), self.served.name)
            self._reader.refuse_unknown(body)
            opening = self._reader.opening(body.must_call)
            return body, self._reader.rendered(body.conversation(), body), opening

        body, prompt, opening = await self._reader.in_turn(len(content), read)
        responses = ChatResponses(
            f"chatcmpl-{secrets.token_hex(12)}",
            self.served.name,
            self._tokenizer,
            prompt_ids=[*prompt, *opening] if body.return_token_ids else None,
            log_probs=body.logprobs,
            reasoning=body.include_reasoning,
            meta_info=body.return_meta_info,
        )
        return await self._answer_chat(http, body, prompt, opening, responses)

    async def create_response(self, http: HttpRequest) -> Response:
        """Answers POST /v1/responses: a chat whose turns are items, and which may go on from a stored response."""
        self._require_open()
        content = await self._reader.content(http)

        def read() -> tuple[ResponseBody, ChatBody, list[dict[str, Any]]]:
            body = read_response(read_json(content), self.served.name)
            before = self._stored.items(body.previous_response_id)
            chat = body.as_chat(before)
            self._reader.refuse_unknown(chat)
            return body, chat, [*before, *body.input]

        body, chat, items = await self._reader.in_turn(len(content), read)
        num_bytes = len(content) + self._stored.num_bytes(body.previous_response_id)
        prompt = await self._reader.in_turn(num_bytes, lambda: self._reader.rendered(chat.conversation(), chat))
        opening = self._reader.opening(chat.must_call)
        responses = ResponseObjects(
            f"resp_{secrets.token_hex(12)}",
            body,
            self._tokenizer,
            effort=chat.effort or self.served.effort,
            temperature=self.served.temperature,
            on_finished=lambda found: self._stored.put(found, [*items, *found["output"]]) if body.store else None,
        )
        return await self._answer_chat(http, chat, prompt, opening, responses)

    async def stored_response(self, name: str) -> dict[str, Any]:
        """Answers GET /v1/responses/{name}."""
        return self._stored.response(name)

    async def delete_response(self, name: str) -> dict[str, Any]:
        """Answers DELETE /v1/responses/{name}."""
        self._stored.delete(name)
        return {"id": name, "object": "response", "deleted": True}

    async def _answer_chat(
        self,
        http: HttpRequest,
        body: ChatBody,
        prompt: Sequence[int],
        opening: Sequence[int],
        responses: ChatResponses | ResponseObjects,
    ) -> Response:
        names = [tool["function"]["name"] for tool in body.offered]
        answers = [
            Answer(
                chat_reader(self._tokenizer, names),
                content_channel=FINAL,
                stop=body.stop,
                opening=opening,
                ignores_end=body.ignore_eos,
                has_draft=self.engine.block_size is not None,
                with_rounds=body.return_rounds,
            )
            for _ in range(body.n)
        ]
        grammar = None
        if body.form is not None or body.offered:
            grammar = await asyncio.to_thread(self._reader.chat_grammar, body)
        return await self._answer(http, body, [(*prompt, *opening)], body.limit, answers, responses, grammar)

    async def tokenize(self, http: HttpRequest) -> JSONResponse:
        """Answers POST /tokenize, vLLM's: the tokens of a text, or of messages as a chat would see them."""
        content = await self._reader.content(http)

        def read() -> list[int]:
            body = read_tokenize(read_json(content), self.served.name)
            if body.messages is None:
                return list(self._reader.encoded(body.prompt or "", body.add_special_tokens))
            self._reader.refuse_unknown(body)
            return self._reader.rendered(body.conversation(), body)

        tokens = await self._reader.in_turn(len(content), read)
        return JSONResponse(
            {"count": len(tokens), "max_model_len": self.engine.config.max_length, "tokens": tokens, "token_strs": None}
        )

    async def detokenize(self, http: HttpRequest) -> JSONResponse:
        """Answers POST /detokenize, vLLM's: the text of tokens, control tokens too."""
        content = await self._reader.content(http)

        def read() -> str:
            body = read_detokenize(read_json(content), self.served.name)
            size = len(self._tokenizer)
            unknown = [token for token in body.tokens if not 0 <= token < size]
            if unknown:
                raise ApiError(f"tokens has {unknown[:5]}; the tokenizer knows 0..{size - 1}", param="tokens")
            return decoded(self._tokenizer, body.tokens)

        return JSONResponse({"prompt": await self._reader.in_turn(len(content), read)})

    async def models(self) -> dict[str, Any]:
        """Answers GET /v1/models."""
        return {"object": "list", "data": [self._model()]}

    async def retrieve_model(self, name: str) -> dict[str, Any]:
        """Answers GET /v1/models/{name}."""
        if name != self.served.name:
            raise ApiError(
                f"the model {name!r} is not served here; served: {self.served.name!r}",
                param="model",
                code="model_not_found",
                status=404,
            )
        return self._model()

    async def health(self) -> JSONResponse:
        """Answers GET /health: 200 while the engine runs, 503 with the reason once it has failed."""
        if self.engine_thread.failure is not None:
            return JSONResponse({"status": "failed", "reason": self.engine_thread.failure}, 503)
        return JSONResponse({"status": "ok"})

    async def ready(self) -> JSONResponse:
        """Answers GET /ready: 200 while requests are taken, 503 with the reason otherwise."""
        if self.is_draining:
            return JSONResponse({"status": "draining", "reason": "the server is shutting down"}, 503)
        return await self.health()

    async def metrics(self) -> PlainTextResponse:
        """Answers GET /metrics."""
        text = metrics.exposition(
            self.counters, self.engine, self.served.name, healthy=self.engine_thread.failure is None
        )
        return PlainTextResponse(text, media_type=metrics.CONTENT_TYPE)

    def _require_open(self) -> None:
        """Raises ApiError when no request is taken: the server is ending, or too many are waiting already."""
        if self.is_draining:
            raise unavailable(Unavailable("the server is shutting down; send the request again later"))
        waiting = self.engine.num_waiting
        if waiting >= self.limits.max_waiting:
            raise ApiError(
                f"{waiting} requests are waiting for a slot, as many as this server allows; send it again later",
                code="server_overloaded",
                status=429,
                kind="server_error",
            )

    async def _answer(
        self,
        http: HttpRequest,
        body: ChatBody | CompletionBody,
        prompts: Sequence[tuple[int, ...]],
        limit: int | None,
        answers: Sequence[Answer],
        responses: Responses | ResponseObjects,
        grammar: CompiledGrammar | None,
    ) -> Response:
        """Runs `body.n` answers of each prompt, of at most `limit` tokens each, and returns the reply."""
        sampling = body.sampling(self.engine.config.stop_token_ids, self.served.temperature)
        seed = secrets.randbits(63) if body.seed is None else body.seed
        requests = [
            Request(
                request_id=f"{responses.reply_id}-{index}",
                prompt_ids=prompts[index // body.n],
                max_new_tokens=self._room(prompts[index // body.n], limit, responses.prompt_param),
                sampling=dataclasses.replace(sampling, key=sampling_key(seed, f"prompt {index}")),
                grammar=grammar,
            )
            for index in range(len(answers))
        ]
        if limit == 0:
            requests = []  # the prompts are echoed, and nothing generated
            for answer in answers:
                answer.finish_reason = "length"
        try:
            stream = await self.engine_thread.submit(requests)
        except PipelineError as error:
            raise ApiError(str(error), param=responses.prompt_param) from error
        except Unavailable as error:
            raise unavailable(error) from error
        call = Generation(stream, answers, prompts, responses, self.counters, self.limits.request_seconds)
        if body.stream:
            events: Events = (
                responses
                if isinstance(responses, ResponseObjects)
                else ChunkEvents(responses, with_usage=body.streams_usage, always=body.streams_usage_always)
            )
            return EventStream(call.events(events), closed=call.close)
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
            "id": self.served.name,
            "object": "model",
            "created": self._created,
            "owned_by": "pipeline",
            "max_model_len": self.engine.config.max_length,
        }


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
