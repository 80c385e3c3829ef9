"""Turns tokens into text as they come: split characters, Harmony channels and calls, and stop strings."""

import dataclasses
from collections.abc import Iterator, Sequence

from pipeline.prompts.chat_format import chat_format_of
from pipeline.prompts.harmony import CONSTRAIN, HEADER_TOKENS, STOP_TOKENS
from pipeline.prompts.tokenizer import Tokenizer, special_token_ids

TEXT, ANALYSIS, FINAL = "text", "analysis", "final"  # channels; TEXT is what /v1/completions returns
CALLED = "to=functions."  # in a header: the message is a call of what follows
REPLACEMENT = "\ufffd"  # what a decoder shows for bytes that are no character (yet)


@dataclasses.dataclass(frozen=True)
class ToolChannel:
    """Names the channel of a call's arguments: the `index`-th call of an answer, of the function `name`."""

    index: int
    name: str


TextChannel = str | ToolChannel


class Detokenizer:
    """Decodes a byte-level token stream piece by piece; a character is returned when its last byte is there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
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
        return _decoded(self._tokenizer, self._pending, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _decoded(tokenizer: Tokenizer, token_ids: Sequence[int], **options: bool) -> str:
    text = tokenizer.decode(list(token_ids), **options)
    assert isinstance(text, str), "only batches give lists"
    return text


class PlainReader:
    """Reads all text as one channel; special tokens are left out."""

    def __init__(self, tokenizer: Tokenizer, channel: str) -> None:
        self._text = Detokenizer(tokenizer)
        self._channel = channel

    def push(self, token_ids: Sequence[int]) -> Iterator[tuple[TextChannel, str]]:
        """Yields the text of further tokens."""
        yield self._channel, self._text.push(token_ids)

    def finish(self, *, cut_off: bool) -> Iterator[tuple[TextChannel, str]]:
        """Ends the answer and yields what was held back; with `cut_off` what was unfinished is dropped."""
        rest = self._text.flush()
        yield self._channel, "" if cut_off else rest


class ChannelReader:
    """Reads the analysis and the final text of an answer, and its calls, as they come.

    No token is lost in silence: channels other than final (commentary) count as analysis, text outside of any
    message as final. A message to a function is a call, whose first piece comes with its header. The recipient stands
    behind the channel or behind the role, where a prompt has ended: an answer that begins with one begins in a header.
    A header cut off before its `<|message|>` is no text. Reading ends at a stop token.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        names = (*STOP_TOKENS, *HEADER_TOKENS, "<|end|>", "<|message|>")
        self._spelled = dict(zip(special_token_ids(tokenizer, names), names, strict=True))
        self._tokenizer = tokenizer
        self._text = Detokenizer(tokenizer)
        self._opening: list[int] | None = []  # the first tokens, while they may be the recipient of a call
        self._header: list[int] | None = None  # the tokens of the header being read; None inside a body
        self._called: str | None = None  # the function that the header names
        self._num_calls = 0
        self._channel: TextChannel = FINAL
        self._in_body = False  # the body has tokens
        self._written: set[TextChannel] = set()  # channels that had a body before
        self._stopped = False

    def push(self, token_ids: Sequence[int]) -> Iterator[tuple[TextChannel, str]]:
        """Yields the text of further tokens; what follows a stop token is not read."""
        body: list[int] = []
        for token_id in token_ids:
            if self._stopped:
                break
            name = self._spelled.get(token_id)
            if name is not None:
                yield from self._read(body + self._opened(name))
                body = []
                yield from self._turn(name)
            elif self._header is not None:
                self._header.append(token_id)
            else:
                body += self._unless_opening(token_id)
        yield from self._read(body)

    def finish(self, *, cut_off: bool) -> Iterator[tuple[TextChannel, str]]:
        """Ends the answer and yields what was held back; with `cut_off` what was unfinished is dropped."""
        opening = self._opened(None)
        yield from self._read([] if self._function_in(opening) else opening)
        yield from self._end_body(cut_off=cut_off)

    def _unless_opening(self, token_id: int) -> list[int]:
        """Returns the tokens that are text: none while the answer may begin with a recipient."""
        if self._opening is None:
            return [token_id]
        self._opening.append(token_id)
        text, wanted = _decoded(self._tokenizer, self._opening), f" {CALLED}"
        return [] if wanted.startswith(text) or text.startswith(wanted) else self._opened(None)

    def _opened(self, control_token: str | None) -> list[int]:
        """Returns the first tokens as text, or, before the rest of a header, makes them its beginning."""
        opening, self._opening = self._opening or [], None
        if control_token not in ("<|channel|>", "<|message|>") or not self._function_in(opening):
            return opening
        self._header = opening
        return []

    def _read(self, token_ids: list[int]) -> Iterator[tuple[TextChannel, str]]:
        if not token_ids:
            return
        if not self._in_body and self._channel in self._written:
            yield self._channel, "\n"  # between two messages of one channel
        self._in_body = True
        yield self._channel, self._text.push(token_ids)

    def _end_body(self, *, cut_off: bool) -> Iterator[tuple[TextChannel, str]]:
        rest = self._text.flush()
        if self._in_body:
            self._written.add(self._channel)
            self._in_body = False
            yield self._channel, "" if cut_off else rest

    def _turn(self, name: str) -> Iterator[tuple[TextChannel, str]]:
        yield from self._end_body(cut_off=False)
        if name in HEADER_TOKENS:
            self._called = self._function_in(self._header or []) if name == "<|channel|>" else None
            self._header = []
        elif name == "<|message|>":
            yield from self._begin_body()
        elif name == "<|end|>":
            self._channel, self._header = FINAL, None
        else:
            self._stopped = True

    def _begin_body(self) -> Iterator[tuple[TextChannel, str]]:
        header = self._header or []
        called, self._called, self._header = self._function_in(header) or self._called, None, None
        words = _decoded(self._tokenizer, header, skip_special_tokens=True).split()
        if called is None:
            self._channel = FINAL if not words or words[0] == FINAL else ANALYSIS
            return
        self._channel = ToolChannel(self._num_calls, called)
        self._num_calls += 1
        yield self._channel, ""

    def _function_in(self, header: list[int]) -> str | None:
        """Returns the function that a header, or a part of it, is addressed to."""
        words = _decoded(self._tokenizer, header).replace(CONSTRAIN, " ").split()
        names = [word.removeprefix(CALLED) for word in words if word.startswith(CALLED)]
        return next((name for name in names if name), None)


TextReader = PlainReader | ChannelReader


def chat_reader(tokenizer: Tokenizer) -> TextReader:
    """Returns the reader of the tokenizer's chat format; where that has no channels, all text is final."""
    return ChannelReader(tokenizer) if chat_format_of(tokenizer).has_channels else PlainReader(tokenizer, FINAL)


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
        starts = [start for start in (text.find(stop) for stop in self._texts) if start >= 0]
        if starts:
            self.found, self._held = True, ""
            return text[: min(starts)]
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
