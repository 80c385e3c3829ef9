"""Writes the objects and events of /v1/responses."""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pipeline.prompts.tokenizer import Tokenizer
from pipeline.serve.answer import Answer
from pipeline.serve.errors import ApiError
from pipeline.serve.logprobs import chat_logprobs
from pipeline.serve.schema.responses import ResponseBody
from pipeline.serve.text_stream import ANALYSIS, TextChannel, ToolChannel


@dataclasses.dataclass
class _Item:
    """One item of the output while it grows."""

    id: str
    channel: TextChannel
    text: str = ""
    log_probs: list[Any] = dataclasses.field(default_factory=list)
    is_done: bool = False


class ResponseObjects:
    """Writes one response, whole or as events; `on_finished` gets it when it is complete."""

    prompt_param = "input"

    def __init__(
        self,
        reply_id: str,
        body: ResponseBody,
        tokenizer: Tokenizer,
        *,
        effort: str,
        temperature: float,
        on_finished: Callable[[dict[str, Any]], None],
    ) -> None:
        self.reply_id = reply_id
        self._on_finished = on_finished
        self._body = body
        self._tokenizer = tokenizer
        self._effort, self._temperature = effort, temperature
        self._created = int(time.time())
        self._items: list[_Item] = []
        self._num_log_probs = 0
        self._num_events = 0

    def whole(self, answers: Sequence[Answer], usage: dict[str, Any]) -> dict[str, Any]:
        """Returns the response that is not streamed."""
        (answer,) = answers
        for channel, text in answer.texts.items():
            item = self._item(channel)
            item.text, item.is_done = text, True
            if channel != ANALYSIS and not isinstance(channel, ToolChannel):
                item.log_probs = self._log_probs(answer)
        return self._finished(answer, usage)

    def opening(self, num_answers: int, usage: Callable[[], dict[str, Any]]) -> Iterator[str]:
        """Yields the events sent before any text."""
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._response("in_progress", None, None))

    def chunks(
        self, index: int, pieces: list[tuple[TextChannel, str]], answer: Answer, usage: Callable[[], dict[str, Any]]
    ) -> Iterator[str]:
        """Yields the events for new pieces of the answer."""
        for channel, text in pieces:
            last = self._items[-1] if self._items else None
            if last is None or last.channel != channel:
                if last is not None:
                    yield from self._ended(last)
                item = self._item(channel)
                yield from self._begun(item)
            item = self._items[-1]
            item.text += text
            if text:
                yield self._delta(item, text, answer)

    def closing(self, answers: Sequence[Answer], usage: dict[str, Any]) -> Iterator[str]:
        """Yields the last events."""
        (answer,) = answers
        if self._items:
            yield from self._ended(self._items[-1])
        found = self._finished(answer, usage)
        yield self._event(f"response.{found['status']}", response=found)

    def failed(self, error: ApiError) -> str:
        """Returns the event of a response that cannot be finished."""
        reason = {"code": "server_error", "message": str(error)}
        return self._event("response.failed", response=self._response("failed", None, None) | {"error": reason})

    @property
    def output(self) -> list[dict[str, Any]]:
        """The items of the answer so far."""
        return [self._shown(item) for item in self._items]

    def _finished(self, answer: Answer, usage: dict[str, Any]) -> dict[str, Any]:
        is_cut = answer.finish_reason == "length"
        found = self._response("incomplete" if is_cut else "completed", "max_output_tokens" if is_cut else None, usage)
        self._on_finished(found)
        return found

    def _response(self, status: str, incomplete: str | None, usage: dict[str, Any] | None) -> dict[str, Any]:
        body = self._body
        return {
            "id": self.reply_id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": None if incomplete is None else {"reason": incomplete},
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": body.model,
            "output": self.output,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": self._effort, "summary": None},
            "store": body.store,
            "temperature": self._temperature if body.temperature is None else body.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": None if usage is None else _usage(usage),
            "user": body.user,
        }

    def _item(self, channel: TextChannel) -> _Item:
        prefix = "fc" if isinstance(channel, ToolChannel) else "rs" if channel == ANALYSIS else "msg"
        item = _Item(f"{prefix}_{self.reply_id.removeprefix('resp_')}_{len(self._items)}", channel)
        self._items.append(item)
        return item

    def _shown(self, item: _Item) -> dict[str, Any]:
        status = "completed" if item.is_done else "in_progress"
        if isinstance(item.channel, ToolChannel):
            call = {"call_id": f"call_{item.id.removeprefix('fc_')}", "name": item.channel.name, "arguments": item.text}
            return {"id": item.id, "type": "function_call", "status": status, **call}
        content = [self._part(item)] if item.is_done else []
        if item.channel == ANALYSIS:
            return {"id": item.id, "type": "reasoning", "summary": [], "content": content, "status": status}
        return {"id": item.id, "type": "message", "status": status, "role": "assistant", "content": content}

    def _part(self, item: _Item) -> dict[str, Any]:
        if item.channel == ANALYSIS:
            return {"type": "reasoning_text", "text": item.text}
        return {"type": "output_text", "text": item.text, "annotations": [], "logprobs": item.log_probs}

    def _begun(self, item: _Item) -> Iterator[str]:
        yield self._event("response.output_item.added", output_index=len(self._items) - 1, item=self._shown(item))
        if not isinstance(item.channel, ToolChannel):
            yield self._event(
                "response.content_part.added", **self._position(item), part=self._part(_Item("", item.channel))
            )

    def _delta(self, item: _Item, text: str, answer: Answer) -> str:
        if isinstance(item.channel, ToolChannel):
            position = {"item_id": item.id, "output_index": len(self._items) - 1}
            return self._event("response.function_call_arguments.delta", **position, delta=text)
        if item.channel == ANALYSIS:
            return self._event("response.reasoning_text.delta", **self._position(item), delta=text)
        new = self._log_probs(answer)
        item.log_probs += new
        return self._event("response.output_text.delta", **self._position(item), delta=text, logprobs=new)

    def _ended(self, item: _Item) -> Iterator[str]:
        item.is_done = True
        if isinstance(item.channel, ToolChannel):
            position = {"item_id": item.id, "output_index": len(self._items) - 1, "name": item.channel.name}
            yield self._event("response.function_call_arguments.done", **position, arguments=item.text)
        else:
            kind = "reasoning_text" if item.channel == ANALYSIS else "output_text"
            more = {} if item.channel == ANALYSIS else {"logprobs": item.log_probs}
            yield self._event(f"response.{kind}.done", **self._position(item), text=item.text, **more)
            yield self._event("response.content_part.done", **self._position(item), part=self._part(item))
        yield self._event("response.output_item.done", output_index=len(self._items) - 1, item=self._shown(item))

    def _position(self, item: _Item) -> dict[str, Any]:
        return {"item_id": item.id, "output_index": len(self._items) - 1, "content_index": 0}

    def _log_probs(self, answer: Answer) -> list[Any]:
        if self._body.top_logprobs is None:
            return []
        new = answer.log_probs[self._num_log_probs :]
        self._num_log_probs = len(answer.log_probs)
        content = chat_logprobs(self._tokenizer, new)["content"]
        assert isinstance(content, list), "what it writes"
        return content

    def _event(self, kind: str, **fields: Any) -> str:
        value = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return f"event: {kind}\ndata: {json.dumps(value, separators=(',', ':'))}\n\n"


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    """Returns usage by this API's names."""
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": usage["prompt_tokens_details"],
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": usage["completion_tokens_details"],
        "total_tokens": usage["total_tokens"],
    }
