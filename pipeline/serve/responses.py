"""Writes OpenAI's completion and chat completion objects, whole and in chunks."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pipeline.engine.request import TokenLogProb
from pipeline.prompts.tokenizer import Tokenizer
from pipeline.serve.answer import Answer, meta_info
from pipeline.serve.errors import ApiError
from pipeline.serve.logprobs import chat_logprobs, completion_logprobs
from pipeline.serve.text_stream import ANALYSIS, FINAL, TEXT, TextChannel, ToolChannel


class CompletionResponses:
    """Writes the replies of /v1/completions.

    With `token_ids` each choice carries its tokens too, as vLLM's does, and with `log_probs` theirs. `echoed` are the
    texts that stand before the answers', one for each, and `prompts` their tokens.
    """

    prompt_param = "prompt"

    def __init__(
        self,
        reply_id: str,
        model: str,
        tokenizer: Tokenizer,
        *,
        token_ids: bool = False,
        log_probs: bool = False,
        echoed: Sequence[str] = (),
        prompts: Sequence[Sequence[int]] = (),
    ) -> None:
        self.reply_id = reply_id
        self._model = model
        self._created = int(time.time())
        self._tokenizer = tokenizer
        self._token_ids = token_ids
        self._log_probs = log_probs
        self._echoed = echoed
        self._prompts = prompts
        self._sent: dict[int, tuple[int, int, int]] = {}  # tokens, log probabilities and characters sent, by choice

    def whole(self, answers: Sequence[Answer], usage: dict[str, Any]) -> dict[str, Any]:
        """Returns the reply that is not streamed."""
        choices = [self._choice(index, answer.texts.get(TEXT, ""), answer) for index, answer in enumerate(answers)]
        return {**self.chunk(choices), "usage": usage}

    def opening(self, num_answers: int) -> Iterator[dict[str, Any]]:
        """Yields the chunks sent before any text: the prompts, where they are echoed."""
        if self._log_probs:
            return  # those of the prompts come with the first tokens
        for index, text in enumerate(self._echoed):
            yield self.chunk([{"index": index, "text": text, "logprobs": None, "finish_reason": None}])
            self._sent[index] = (0, 0, len(text))

    def chunks(self, index: int, pieces: list[tuple[TextChannel, str]], answer: Answer) -> Iterator[dict[str, Any]]:
        """Yields the chunks for new pieces of an answer."""
        has_tokens = self._token_ids and len(answer.token_ids) > self._sent.get(index, (0, 0, 0))[0]
        if pieces or answer.finish_reason is not None or has_tokens:
            yield self.chunk([self._choice(index, "".join(text for _, text in pieces), answer)])

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns the object around choices."""
        return {
            "id": self.reply_id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def _choice(self, index: int, text: str, answer: Answer) -> dict[str, Any]:
        """Returns a choice with a text and what else the answer has that was not sent yet."""
        num_tokens, num_log_probs, offset = self._sent.get(index, (0, 0, 0))
        new: list[TokenLogProb | int] = list(answer.log_probs[num_log_probs:])
        if not (num_tokens or offset) and self._echoed:
            text = self._echoed[index] + text
            if self._log_probs:
                new = [*self._prompts[index][:1], *answer.prompt_log_probs, *new]
            else:
                offset = len(self._echoed[index])
        found = completion_logprobs(self._tokenizer, new, offset) if self._log_probs else None
        choice = {"index": index, "text": text, "logprobs": found, "finish_reason": answer.finish_reason}
        if self._token_ids:
            choice["token_ids"] = answer.token_ids[num_tokens:]
        offset += sum(map(len, found["tokens"])) if found else 0
        self._sent[index] = (len(answer.token_ids), len(answer.log_probs), offset)
        return choice


class ChatResponses:
    """Writes the replies of /v1/chat/completions.

    The final text is the content; the analysis goes by both names in use, unless `reasoning` leaves it out; calls are
    apart. With `prompt_ids` a whole reply carries them, and its choices the tokens of their answers, as vLLM's do; with
    `meta_info` the numbers of rounds, as SGLang's does.
    """

    prompt_param = "messages"

    def __init__(
        self,
        reply_id: str,
        model: str,
        tokenizer: Tokenizer,
        *,
        prompt_ids: Sequence[int] | None = None,
        log_probs: bool = False,
        reasoning: bool = True,
        meta_info: bool = False,
    ) -> None:
        self.reply_id = reply_id
        self._model = model
        self._created = int(time.time())
        self._tokenizer = tokenizer
        self._prompt_ids = prompt_ids
        self._log_probs = log_probs
        self._reasoning = reasoning
        self._meta_info = meta_info
        self._announced: set[tuple[int, ToolChannel]] = set()  # calls whose id and name are sent, by choice
        self._num_sent: dict[int, int] = {}  # log probabilities, by choice

    def whole(self, answers: Sequence[Answer], usage: dict[str, Any]) -> dict[str, Any]:
        """Returns the reply that is not streamed."""
        prompt = {} if self._prompt_ids is None else {"prompt_token_ids": list(self._prompt_ids)}
        choices = []
        for index, answer in enumerate(answers):
            message: dict[str, Any] = {"role": "assistant", "content": answer.texts.get(FINAL, ""), "refusal": None}
            if self._reasoning:
                message |= dict.fromkeys(("reasoning_content", "reasoning"), answer.texts.get(ANALYSIS))
            calls = answer.calls
            if calls:
                message["content"] = message["content"] or None
                message["tool_calls"] = [self._call(index, call, answer.texts[call]) for call in calls]
            choice = {"index": index, "message": message}
            choice |= {"logprobs": self._new_log_probs(index, answer), "finish_reason": _reason(answer)}
            choices.append({**choice, "token_ids": answer.token_ids} if prompt else choice)
        more = {"meta_info": meta_info(answers)} if self._meta_info else {}
        return {**self._reply("chat.completion", choices), **prompt, **more, "usage": usage}

    def opening(self, num_answers: int) -> Iterator[dict[str, Any]]:
        """Yields the chunks sent before any text: they say who speaks."""
        for index in range(num_answers):
            yield self._delta(index, {"role": "assistant", "content": ""})

    def chunks(self, index: int, pieces: list[tuple[TextChannel, str]], answer: Answer) -> Iterator[dict[str, Any]]:
        """Yields the chunks for new pieces of an answer."""
        if answer.round is not None:
            choice = {"index": index, "delta": {}, "logprobs": None, "finish_reason": None, "round": answer.round}
            yield self.chunk([choice])
        for channel, text in pieces:
            if isinstance(channel, ToolChannel):
                yield self._delta(index, {"tool_calls": [self._call_delta(index, channel, text)]})
            elif channel != ANALYSIS:
                yield self._delta(index, {"content": text}, log_probs=self._new_log_probs(index, answer))
            elif self._reasoning:
                yield self._delta(index, dict.fromkeys(("reasoning_content", "reasoning"), text))
        if answer.finish_reason is not None:
            has_more = self._num_sent.get(index, 0) < len(answer.log_probs)
            log_probs = self._new_log_probs(index, answer) if has_more else None
            yield self._delta(index, {}, finish_reason=_reason(answer), log_probs=log_probs)

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns the object around choices."""
        return self._reply("chat.completion.chunk", choices)

    def _new_log_probs(self, index: int, answer: Answer) -> dict[str, Any] | None:
        if not self._log_probs:
            return None
        new = answer.log_probs[self._num_sent.get(index, 0) :]
        self._num_sent[index] = len(answer.log_probs)
        return chat_logprobs(self._tokenizer, new)

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

    def _delta(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        finish_reason: str | None = None,
        log_probs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        return self.chunk([{"index": index, "delta": delta, "logprobs": log_probs, "finish_reason": finish_reason}])

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


class ChunkEvents:
    """Writes the chunks of both kinds of completions as server-sent events.

    With usage each chunk has the field: null but in the last one, or `always` what was used so far.
    """

    def __init__(self, responses: Responses, *, with_usage: bool, always: bool) -> None:
        self._responses, self._with_usage, self._always = responses, with_usage, always

    def opening(self, num_answers: int, usage: Callable[[], dict[str, Any]]) -> Iterator[str]:
        """Yields the events sent before any text."""
        for chunk in self._responses.opening(num_answers):
            yield self._with(usage, chunk)

    def chunks(
        self, index: int, pieces: list[tuple[TextChannel, str]], answer: Answer, usage: Callable[[], dict[str, Any]]
    ) -> Iterator[str]:
        """Yields the events for new pieces of an answer."""
        for chunk in self._responses.chunks(index, pieces, answer):
            yield self._with(usage, chunk)

    def closing(self, answers: Sequence[Answer], usage: dict[str, Any]) -> Iterator[str]:
        """Yields the last events."""
        if self._with_usage:
            yield _event({**self._responses.chunk([]), "usage": usage})
        yield "data: [DONE]\n\n"

    def failed(self, error: ApiError) -> str:
        """Returns the event of an answer that cannot be finished."""
        return _event(error.body)

    def _with(self, usage: Callable[[], dict[str, Any]], chunk: dict[str, Any]) -> str:
        used = usage() if self._always else None
        return _event({**chunk, "usage": used} if self._with_usage else chunk)


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n"
