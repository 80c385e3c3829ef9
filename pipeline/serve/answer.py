"""Collects one request's answer as it grows: its text by channel, why it ended, and what it used."""

import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pipeline.dflash.acceptance import accept_length_of
from pipeline.engine.request import StepUpdate, TokenLogProb
from pipeline.serve.channel_reader import TextReader
from pipeline.serve.text_stream import ANALYSIS, StopStrings, TextChannel, ToolChannel


class Answer:
    """Reads a request's updates, of which those of rounds count drafted tokens where there is a draft.

    Stop strings are looked for in `content_channel` alone; the token that completes one is the answer's last, and the
    rest of its round is dropped. `log_probs` are those of that channel's tokens, where the request asked for them.
    `opening` are tokens of the answer that its prompt has already. With `ignores_end` it goes on to its limit. With
    `prompt_alone` what is generated is dropped. `with_rounds` the last update is known token by token.
    """

    def __init__(
        self,
        reader: TextReader,
        *,
        content_channel: str,
        stop: Sequence[str] = (),
        opening: Sequence[int] = (),
        ignores_end: bool = False,
        has_draft: bool,
        prompt_alone: bool = False,
        with_rounds: bool = False,
    ) -> None:
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.texts: dict[TextChannel, str] = {}
        self.log_probs: list[TokenLogProb] = []
        self.prompt_log_probs: tuple[TokenLogProb, ...] = ()  # of all tokens of the prompt but the first
        self.has_draft = has_draft
        self.num_rounds = 0
        self.num_accepted = 0
        self.num_drafted = 0
        self._reader = reader
        self._stop = StopStrings(stop) if stop else None
        self._content_channel = content_channel
        self._ignores_end = ignores_end
        self._prompt_alone = prompt_alone
        self.round: dict[str, Any] | None = None  # of the last update, as the stream of a chat has it
        self._with_rounds = with_rounds
        self._unread: list[TokenLogProb] = []  # of tokens that may still turn out to be content
        self._opened = list(reader.push(opening)) if opening else []

    @property
    def calls(self) -> list[ToolChannel]:
        """The calls of functions in the answer; their arguments are in `texts`."""
        return [channel for channel in self.texts if isinstance(channel, ToolChannel)]

    @property
    def num_reasoning(self) -> int:
        """The number of tokens of the analysis."""
        return self._reader.num_tokens[ANALYSIS]

    def take(self, update: StepUpdate) -> list[tuple[TextChannel, str]]:
        """Returns the new pieces of text, each with its channel; they are the last when `finish_reason` is set."""
        self.prompt_log_probs = update.prompt_log_probs or self.prompt_log_probs
        if self._prompt_alone:
            self.finish_reason = "length"
            return []
        pieces, self._opened = self._opened, []
        starts = []  # where each token's pieces begin
        before = len(self.token_ids)
        # one by one, to know which token completes a stop string or belongs to the content; all at once is quicker
        singly = self._stop is not None or update.log_probs or self._with_rounds
        steps = [(token_id,) for token_id in update.token_ids] if singly else [update.token_ids]
        for index, step in enumerate(steps):
            self.token_ids += step
            starts.append(len(pieces))
            already = self._reader.num_tokens[self._content_channel]
            pieces += self._visible(self._reader.push(step))
            if update.log_probs:
                self._take_log_prob(update.log_probs[index], self._reader.num_tokens[self._content_channel] - already)
            if self._stop is not None and self._stop.found:
                self.finish_reason = "stop"
                break
        if update.num_accepted is not None:
            self.num_rounds += 1
            self.num_accepted += min(update.num_accepted, len(self.token_ids) - before - 1)
            self.num_drafted += update.num_drafted or 0
        has_ended = update.finish_reason or ("stop" if self._reader.has_left_turn and not self._ignores_end else None)
        if self.finish_reason is None and has_ended is not None:
            self.finish_reason = has_ended
            pieces += self._visible(self._reader.finish(cut_off=has_ended == "length"))
            if self._stop is not None and self._stop.found:
                self.finish_reason = "stop"
            elif self._stop is not None:
                pieces.append((self._content_channel, self._stop.flush()))
        if self._with_rounds:
            ends = [*starts[1:], len(pieces)]
            tokens = [list(_merged(pieces[start:end])) for start, end in zip(starts, ends, strict=True)]
            self.round = _round(tokens, update)
        pieces = list(_merged(pieces))
        for channel, text in pieces:
            self.texts[channel] = self.texts.get(channel, "") + text
        return pieces

    def _take_log_prob(self, found: TokenLogProb, num_new: int) -> None:
        """Adds a token's log probability when the reader says that it, and tokens before it, are content."""
        if self._reader.is_control(found.token_id):
            self.log_probs += self._unread[len(self._unread) - num_new :]
            self._unread = []
            return
        self._unread.append(found)
        if num_new:
            self.log_probs += self._unread[len(self._unread) - num_new :]
            self._unread = []

    def _visible(self, pieces: Iterable[tuple[TextChannel, str]]) -> Iterator[tuple[TextChannel, str]]:
        for channel, text in pieces:
            if self._stop is not None and channel == self._content_channel:
                yield channel, self._stop.push(text)
            else:
                yield channel, text


def meta_info(answers: Sequence[Answer]) -> dict[str, Any]:
    """Returns SGLang's numbers of the rounds of a reply's answers; without a draft there are none."""
    rounds, accepted = (sum(getattr(answer, name) for answer in answers) for name in ("num_rounds", "num_accepted"))
    found: dict[str, Any] = {"completion_tokens": sum(len(answer.token_ids) for answer in answers)}
    if rounds:
        found |= {"spec_verify_ct": rounds, "spec_accept_length": accept_length_of(accepted, rounds)}
    return found


def _round(tokens: Sequence[list[tuple[TextChannel, str]]], update: StepUpdate) -> dict[str, Any]:
    """Returns the texts of an update's tokens by channel; all but the last were drafted where a round gave them."""
    shown = [
        [{"channel": channel if isinstance(channel, str) else "call", "text": text} for channel, text in pieces]
        for pieces in tokens
    ]
    num_accepted = None if update.num_accepted is None else len(tokens) - 1
    return {"num_accepted": num_accepted, "num_drafted": update.num_drafted, "tokens": shown}


def usage(answers: Sequence[Answer], prompt_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """Returns OpenAI's usage object over the answers of one HTTP request, whose prompts have `prompt_tokens` tokens.

    Of these `cached_tokens` were computed for earlier requests. Rejected prediction tokens are drafted ones that the
    target did not accept; they are no completion tokens.
    """
    completion = sum(len(answer.token_ids) for answer in answers)
    details: dict[str, int] = {"reasoning_tokens": sum(answer.num_reasoning for answer in answers)}
    if any(answer.has_draft for answer in answers):
        accepted = sum(answer.num_accepted for answer in answers)
        details["accepted_prediction_tokens"] = accepted
        details["rejected_prediction_tokens"] = sum(answer.num_drafted for answer in answers) - accepted
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": prompt_tokens + completion,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
        "completion_tokens_details": details,
    }


def _merged(pieces: Iterable[tuple[TextChannel, str]]) -> Iterator[tuple[TextChannel, str]]:
    """Joins neighbours of one channel and drops empty pieces, but for a call's, which may have no arguments yet."""
    full = [piece for piece in pieces if piece[1] or isinstance(piece[0], ToolChannel)]
    for channel, group in itertools.groupby(full, key=operator.itemgetter(0)):
        yield channel, "".join(text for _, text in group)
