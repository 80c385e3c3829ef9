"""Writes OpenAI's completion and chat completion objects, whole and in chunks."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.serve.answer import Answer, usage
from pipeline.serve.text_stream import ANALYSIS, FINAL, TEXT, TextChannel, ToolChannel


class CompletionResponses:
    """Writes the replies of /v1/completions; with `token_ids` each choice carries its tokens too, as vLLM's does."""

    prompt_param = "prompt"

    def __init__(self, reply_id: str, model: str, token_ids: bool) -> None:
        self.reply_id = reply_id
        self._model = model
        self._created = int(time.time())
        self._token_ids = token_ids
        self._sent: dict[int, int] = {}  # tokens already sent, by choice

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Returns the reply that is not streamed."""
        choices = [
            self._choice(index, answer.texts.get(TEXT, ""), answer.finish_reason, answer.token_ids)
            for index, answer in enumerate(answers)
        ]
        return {**self.chunk(choices), "usage": usage(answers)}

    def opening(self, num_answers: int) -> Iterator[dict[str, Any]]:
        """Yields the chunks sent before any text: none."""
        yield from ()

    def chunks(self, index: int, pieces: list[tuple[TextChannel, str]], answer: Answer) -> Iterator[dict[str, Any]]:
        """Yields the chunks for new pieces of an answer."""
        new = answer.token_ids[self._sent.get(index, 0) :]
        if pieces or answer.finish_reason is not None or (new and self._token_ids):
            self._sent[index] = len(answer.token_ids)
            text = "".join(text for _, text in pieces)
            yield self.chunk([self._choice(index, text, answer.finish_reason, new)])

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns the object around choices."""
        return {
            "id": self.reply_id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def _choice(self, index: int, text: str, finish_reason: str | None, token_ids: Sequence[int]) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}
        return {**choice, "token_ids": list(token_ids)} if self._token_ids else choice


class ChatResponses:
    """Writes the replies of /v1/chat/completions.

    The final text is the content; the analysis goes by both names in use; calls are apart. With
    `prompt_ids` a whole reply carries them, and its choices the tokens of their answers, as vLLM's do.
    """

    prompt_param = "messages"

    def __init__(self, reply_id: str, model: str, prompt_ids: Sequence[int] | None = None) -> None:
        self.reply_id = reply_id
        self._model = model
        self._created = int(time.time())
        self._prompt_ids = prompt_ids
        self._announced: set[tuple[int, ToolChannel]] = set()  # calls whose id and name are sent, by choice

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Returns the reply that is not streamed."""
        prompt = {} if self._prompt_ids is None else {"prompt_token_ids": list(self._prompt_ids)}
        choices = []
        for index, answer in enumerate(answers):
            analysis = answer.texts.get(ANALYSIS)
            message: dict[str, Any] = {"role": "assistant", "content": answer.texts.get(FINAL, ""), "refusal": None}
            message |= {"reasoning_content": analysis, "reasoning": analysis}
            calls = answer.calls
            if calls:
                message["content"] = message["content"] or None
                message["tool_calls"] = [self._call(index, call, answer.texts[call]) for call in calls]
            choice = {"index": index, "message": message, "logprobs": None, "finish_reason": _reason(answer)}
            choices.append({**choice, "token_ids": answer.token_ids} if prompt else choice)
        return {**self._reply("chat.completion", choices), **prompt, "usage": usage(answers)}

    def opening(self, num_answers: int) -> Iterator[dict[str, Any]]:
        """Yields the chunks sent before any text: they say who speaks."""
        for index in range(num_answers):
            yield self._delta(index, {"role": "assistant", "content": ""}, None)

    def chunks(self, index: int, pieces: list[tuple[TextChannel, str]], answer: Answer) -> Iterator[dict[str, Any]]:
        """Yields the chunks for new pieces of an answer."""
        for channel, text in pieces:
            if isinstance(channel, ToolChannel):
                yield self._delta(index, {"tool_calls": [self._call_delta(index, channel, text)]}, None)
                continue
            names = ("reasoning_content", "reasoning") if channel == ANALYSIS else ("content",)
            yield self._delta(index, dict.fromkeys(names, text), None)
        if answer.finish_reason is not None:
            yield self._delta(index, {}, _reason(answer))

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns the object around choices."""
        return self._reply("chat.completion.chunk", choices)

    def _call(self, index: int, call: ToolChannel, arguments: str) -> dict[str, Any]:
        """Returns a call with an id of its own."""
        function = {"name": call.name, "arguments": arguments}
        return {"id": f"call-{self.reply_id}-{index}-{call.index}", "type": "function", "function": function}

    def _call_delta(self, index: int, call: ToolChannel, text: str) -> dict[str, Any]:
        """Returns a piece of a call: the first has its id and name, the later ones more of its arguments."""
        if (index, call) in self._announced:
            return {"index": call.index, "function": {"arguments": text}}
        self._announced.add((index, call))
        return {"index": call.index, **self._call(index, call, text)}

    def _delta(self, index: int, delta: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        return self.chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}])

    def _reply(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.reply_id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }


def _reason(answer: Answer) -> str | None:
    """Returns why an answer ended, in OpenAI's words: with calls, by itself, or at its limit."""
    return "tool_calls" if answer.finish_reason == "stop" and answer.calls else answer.finish_reason


Responses = CompletionResponses | ChatResponses
