"""Collects one request's answer as it grows: its text by channel, why it ended, and what it used."""

import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pipeline.engine.request import StepUpdate
from pipeline.serve.text_stream import StopStrings, TextChannel, TextReader, ToolChannel


class Answer:
    """Reads a request's updates, of which those of rounds count drafted tokens where there is a draft.

    Stop strings are looked for in `stop_channel` alone; the token that completes one is the answer's last,
    and the rest of its round is dropped.
    """

    def __init__(
        self, reader: TextReader, *, stop: Sequence[str], stop_channel: str, prompt_tokens: int, has_draft: bool
    ) -> None:
        self.prompt_tokens = prompt_tokens
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.texts: dict[TextChannel, str] = {}
        self._reader = reader
        self._stop = StopStrings(stop) if stop else None
        self._stop_channel = stop_channel
        self.has_draft = has_draft
        self.num_accepted = 0
        self.num_drafted = 0

    @property
    def calls(self) -> list[ToolChannel]:
        """The calls of functions in the answer; their arguments are in `texts`."""
        return [channel for channel in self.texts if isinstance(channel, ToolChannel)]

    def take(self, update: StepUpdate) -> list[tuple[TextChannel, str]]:
        """Returns the new pieces of text, each with its channel; they are the last when `finish_reason` is set."""
        pieces: list[tuple[TextChannel, str]] = []
        before = len(self.token_ids)
        # one by one, to know which token completes a stop string; all at once is quicker
        steps = [update.token_ids] if self._stop is None else [(token_id,) for token_id in update.token_ids]
        for step in steps:
            self.token_ids += step
            pieces += self._visible(self._reader.push(step))
            if self._stop is not None and self._stop.found:
                self.finish_reason = "stop"
                break
        if update.num_accepted is not None:
            self.num_accepted += min(update.num_accepted, len(self.token_ids) - before - 1)
            self.num_drafted += update.num_drafted or 0
        if self.finish_reason is None and update.finish_reason is not None:
            self.finish_reason = update.finish_reason
            pieces += self._visible(self._reader.finish(cut_off=update.finish_reason == "length"))
            if self._stop is not None and self._stop.found:
                self.finish_reason = "stop"
            elif self._stop is not None:
                pieces.append((self._stop_channel, self._stop.flush()))
        pieces = list(_merged(pieces))
        for channel, text in pieces:
            self.texts[channel] = self.texts.get(channel, "") + text
        return pieces

    def _visible(self, pieces: Iterable[tuple[TextChannel, str]]) -> Iterator[tuple[TextChannel, str]]:
        for channel, text in pieces:
            if self._stop is not None and channel == self._stop_channel:
                yield channel, self._stop.push(text)
            else:
                yield channel, text


def usage(answers: Sequence[Answer]) -> dict[str, Any]:
    """Returns OpenAI's usage object over the answers of one HTTP request.

    Rejected prediction tokens are drafted ones that the target did not accept; they are no completion tokens.
    """
    prompt = sum(answer.prompt_tokens for answer in answers)
    completion = sum(len(answer.token_ids) for answer in answers)
    found: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
    if any(answer.has_draft for answer in answers):
        accepted = sum(answer.num_accepted for answer in answers)
        drafted = sum(answer.num_drafted for answer in answers)
        found["completion_tokens_details"] = {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": drafted - accepted,
        }
    return found


def _merged(pieces: Iterable[tuple[TextChannel, str]]) -> Iterator[tuple[TextChannel, str]]:
    """Joins neighbours of one channel and drops empty pieces, but for a call's, which may have no arguments yet."""
    full = [piece for piece in pieces if piece[1] or isinstance(piece[0], ToolChannel)]
    for channel, group in itertools.groupby(full, key=operator.itemgetter(0)):
        yield channel, "".join(text for _, text in group)
