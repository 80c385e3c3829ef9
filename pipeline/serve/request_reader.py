"""Reads requests: their bodies within a limit, and the tokens of what they ask."""

import asyncio
import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import Request as HttpRequest
from starlette.requests import ClientDisconnect

from pipeline.errors import PipelineError
from pipeline.prompts.chat_format import chat_format_of, render_prompt, stop_token_ids
from pipeline.prompts.harmony import CONSTRAIN
from pipeline.prompts.text_length import TextTooLong, longest_token
from pipeline.prompts.tokenizer import Tokenizer
from pipeline.prompts.tools import tools_problem
from pipeline.serve import answer_grammar
from pipeline.serve.errors import ApiError
from pipeline.serve.grammars import CompiledGrammar, Grammars
from pipeline.serve.schema.chat import ChatBody
from pipeline.serve.schema.completion import CompletionBody
from pipeline.serve.schema.tokens import TokenizeBody

CLIENT_CLOSED_REQUEST = 499  # nginx's; nobody is left to read it
SHORT_TEXT = 2**14  # bytes of text that are encoded at once; more would hold up everybody's streams
Read = TypeVar("Read")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServedModel:
    """Names what is served, and what a request gets that says nothing: effort, temperature, the day (None: today)."""

    name: str
    effort: str
    temperature: float = 1.0
    date: str | None = None


class RequestReader:
    """Reads bodies of at most `max_body_bytes`, and makes prompts of them in the tokenizer's chat format.

    A text that cannot fit into `max_length` tokens is refused before it is encoded.
    """

    def __init__(
        self, tokenizer: Tokenizer, served: ServedModel, grammars: Grammars, *, max_body_bytes: int, max_length: int
    ) -> None:
        self._grammars = grammars
        self._tokenizer, self._served, self._max_body_bytes = tokenizer, served, max_body_bytes
        self._max_length, self._longest_token = max_length, longest_token(tokenizer)
        self._encoding = asyncio.Lock()  # of long texts, one at a time: each takes much memory

    async def content(self, http: HttpRequest) -> bytes:
        """Returns a request's body; raises ApiError when it is too large, before it is read as far as that is known."""
        limit = self._max_body_bytes
        announced = http.headers.get("content-length", "")
        parts, size = [], 0
        if not (announced.isdecimal() and int(announced) > limit):
            try:
                async for part in http.stream():
                    parts.append(part)
                    size += len(part)
                    if size > limit:
                        break
            except ClientDisconnect as error:
                raise ApiError("the client went away", status=CLIENT_CLOSED_REQUEST) from error
            if size <= limit:
                return b"".join(parts)
        raise ApiError(
            f"the body has {announced or f'more than {limit}'} bytes; this server reads {limit}: shorten the request, "
            "or start the server with a larger serve.max_body_bytes",
            code="request_too_large",
            status=413,
        )

    async def in_turn(self, num_bytes: int, read: Callable[[], Read]) -> Read:
        """Returns what so many bytes are read to; many are read in a thread, so that streams go on meanwhile."""
        if num_bytes <= SHORT_TEXT:
            return read()
        async with self._encoding:
            return await asyncio.to_thread(read)

    def encoded(self, prompt: str | tuple[int, ...], add_special_tokens: bool) -> tuple[int, ...]:
        """Returns the tokens of a prompt, which may be tokens already."""
        if isinstance(prompt, tuple):
            return prompt
        if self._most_characters is not None and len(prompt) > self._most_characters:
            raise self._too_long(len(prompt), "prompt")
        return tuple(self._tokenizer.encode(prompt, add_special_tokens=add_special_tokens))

    def rendered(self, conversation: list[dict[str, Any]], body: Any) -> list[int]:
        """Returns a chat's prompt; `body` has its effort and the tools that it offers."""
        effort = body.effort or self._served.effort
        try:
            return render_prompt(
                self._tokenizer,
                conversation,
                effort,
                tools=body.offered,
                date=self._served.date,
                may_be_empty=True,
                most_characters=self._most_characters,
            )
        except TextTooLong as error:
            raise self._too_long(error.num_characters, "messages") from error
        except PipelineError as error:
            raise ApiError(str(error), param="messages") from error

    @property
    def _most_characters(self) -> int | None:
        """The characters that a prompt has at most, if each token were the longest; None where that is not known."""
        return None if self._longest_token is None else self._longest_token * self._max_length

    def _too_long(self, num_characters: int, param: str) -> ApiError:
        assert self._longest_token is not None
        fewest = -(-num_characters // self._longest_token)
        return ApiError(
            f"the prompt has {num_characters} characters, which are at least {fewest} tokens; this server's context is "
            f"{self._max_length} tokens: shorten the prompt, or start the server with a larger engine.max_length",
            param=param,
            code="context_length_exceeded",
        )

    def opening(self, function: str | None) -> list[int]:
        """Returns how an answer must begin that has to call a function ("": any of them)."""
        if function is None:
            return []
        name = f".{function} {CONSTRAIN}json<|message|>" if function else ""
        text = f"<|channel|>commentary to=functions{name}"
        return self._tokenizer.encode(text, add_special_tokens=False)

    def chat_grammar(self, body: ChatBody) -> CompiledGrammar | None:
        """Returns the grammar of a chat's answer, None where anything may be answered; raises ApiError.

        A call that is demanded has the arguments that its function takes; where its schema cannot be followed and need
        not be, a JSON object.
        """
        tools = body.offered
        if body.must_call is not None:
            wanted = [tool for tool in tools if body.must_call in ("", tool["function"]["name"])]
            followed = functools.partial(answer_grammar.call_grammar, wanted, is_named=bool(body.must_call))
            try:
                return self._compiled(followed(with_schemas=True), "tools")
            except ApiError:
                return self._compiled(followed(with_schemas=False), "tools")
        if body.form is None and not any(map(answer_grammar.is_strict, tools)):
            return None
        if not chat_format_of(self._tokenizer).has_channels:
            return self.text_grammar(body)
        return self._compiled(answer_grammar.harmony_grammar(body.form, tools), body.form_param or "tools")

    def text_grammar(self, body: ChatBody | CompletionBody) -> CompiledGrammar | None:
        """Returns the grammar of an answer that is text alone, None where any may be answered; raises ApiError."""
        if body.form is None:
            return None
        text = answer_grammar.plain_grammar(body.form, stop_token_ids(self._tokenizer))
        return self._compiled(text, body.form_param)

    def _compiled(self, grammar: str, param: str | None) -> CompiledGrammar:
        try:
            return self._grammars.compiled(grammar)
        except PipelineError as error:
            raise ApiError(f"{param} cannot be followed: {error}; change it", param=param) from error

    def refuse_unknown(self, body: ChatBody | TokenizeBody) -> None:
        """Raises ApiError for what the target's chat format does not know, and for tools that are malformed."""
        chat_format = chat_format_of(self._tokenizer)
        if body.effort is not None and not chat_format.has_efforts:
            raise ApiError(f"{self._served.name} knows no reasoning efforts: leave it out", param="reasoning_effort")
        if body.tools and not chat_format.has_tools:
            raise ApiError(f"{self._served.name} knows no tools: leave them out", param="tools")
        problem = tools_problem(body.tools)
        if problem is not None:
            raise ApiError(problem, param="tools")


def read_json(content: bytes) -> Any:
    """Returns what a body is the JSON of; raises ApiError."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is not JSON ({error}); send a JSON object") from error
