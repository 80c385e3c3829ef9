"""Turns tokens into text as they come: split characters, one channel of text, and stop strings."""

import collections
import dataclasses
import functools
from collections.abc import Iterator, Sequence

from pipeline.prompts.tokenizer import Tokenizer

TEXT, ANALYSIS, FINAL = "text", "analysis", "final"  # channels; TEXT is what /v1/completions returns
REPLACEMENT = "\ufffd"  # what a decoder shows for bytes that are no character (yet)


@dataclasses.dataclass(frozen=True)
class ToolChannel:
    """Names the channel of a call's arguments: the `index`-th call of an answer, of the function `name`."""

    index: int
    name: str


TextChannel = str | ToolChannel


class Detokenizer:
    """Decodes a byte-level token stream piece by piece; a character is returned when its last byte is there."""

    def __init__(self, tokenizer: Tokenizer, *, skips_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skips_special = skips_special
        self._pending: list[int] = []  # tokens since the last point at which text and tokens ended together
        self._taken = 0  # characters of the pending tokens' text already taken from it
        self._doubtful = ""  # replacement characters, shown if anything follows them

    def push(self, token_ids: Sequence[int]) -> str:
        """Returns the text that is certain now."""
        self._pending += token_ids
        text = self._decoded()
        if text.endswith(REPLACEMENT):  # an unfinished character decodes to one of these
            certain = text[self._taken : -1]
            self._taken = len(text) - 1
        else:
            certain = text[self._taken :]
            self._pending, self._taken = [], 0
        certain = self._doubtful + certain
        shown = certain.rstrip(REPLACEMENT)
        self._doubtful = certain[len(shown) :]
        return shown

    def flush(self) -> str:
        """Returns what was held back, as replacement characters; the next push starts afresh."""
        rest = self._doubtful + self._decoded()[self._taken :]
        self._pending, self._taken, self._doubtful = [], 0, ""
        return rest

    def _decoded(self) -> str:
        return decoded(self._tokenizer, self._pending, skip_special_tokens=self._skips_special)


def decoded(tokenizer: Tokenizer, token_ids: Sequence[int], **options: bool) -> str:
    """Returns the text of tokens, with their spaces as they are."""
    text = tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False, **options)
    assert isinstance(text, str), "only batches give lists"
    return text


@functools.lru_cache(maxsize=8)  # every answer asks, and GPT-OSS has a thousand of them
def _special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    return frozenset(token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special)


class PlainReader:
    """Reads all text as one channel; special tokens are left out unless they are wanted.

    `num_tokens` counts the tokens of a channel's text.
    """

    has_left_turn = False  # a plain text has no turns

    def __init__(self, tokenizer: Tokenizer, channel: str, *, skips_special: bool = True) -> None:
        self._text = Detokenizer(tokenizer, skips_special=skips_special)
        self._channel = channel
        self._skipped = _special_ids(tokenizer) if skips_special else frozenset()
        self.num_tokens: collections.Counter[TextChannel] = collections.Counter()

    def is_control(self, token_id: int) -> bool:
        """Returns whether a token is no text."""
        return token_id in self._skipped

    def push(self, token_ids: Sequence[int]) -> Iterator[tuple[TextChannel, str]]:
        """Yields the text of further tokens."""
        self.num_tokens[self._channel] += sum(token_id not in self._skipped for token_id in token_ids)
        yield self._channel, self._text.push(token_ids)

    def finish(self, *, cut_off: bool) -> Iterator[tuple[TextChannel, str]]:
        """Ends the answer and yields what was held back; with `cut_off` what was unfinished is dropped."""
        rest = self._text.flush()
        yield self._channel, "" if cut_off else rest


class StopStrings:
    """Ends a text before the first stop string, holding back what could be the beginning of one."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = tuple(texts)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Returns the text that no stop string can take back; "" once one was `found`."""
        if self.found:
            return ""
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._texts if (start := text.find(stop)) >= 0]
        if found:
            self.found, self._held = True, ""
            return text[: min(found)[1]]  # before the one that is complete first
        held = max((_overlap(text, stop) for stop in self._texts), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """Returns what was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest end of `text` that is a beginning of `stop`, shorter than it."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
