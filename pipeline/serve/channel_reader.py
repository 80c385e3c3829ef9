"""Reads GPT-OSS's answers: Harmony's channels and calls, also where the model writes them otherwise than it was taught.

What models really write, and what is made of it: the table in tests/serve/test_channel_reader.py.
"""

import collections
import json
import re
from collections.abc import Iterator, Sequence

from pipeline.prompts.chat_format import chat_format_of
from pipeline.prompts.harmony import CONSTRAIN, STOP_TOKENS
from pipeline.prompts.tokenizer import Tokenizer, special_token_ids
from pipeline.serve.text_stream import ANALYSIS, FINAL, Detokenizer, PlainReader, TextChannel, ToolChannel, decoded

START, CHANNEL, MESSAGE, END, CALL = "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>"
ROLE = "assistant"
RECIPIENT, FUNCTIONS = "to=", "functions."
PARALLEL = "multi_tool_use.parallel"  # a tool that some models were taught, whose argument lists calls
TYPES = ("json", "code")  # of a call's argument; some models glue it to the function's name
HEADER = re.compile(rf"\s*(?:{ROLE}\s*)?(?:{RECIPIENT}\S+\s*)?")  # up to the channel, without its <|start|>
COMMENTARY = "commentary"  # without a recipient it is a preamble, which is meant for the user


class ChannelReader:
    """Reads the analysis and the final text of an answer, and its calls, as they come.

    No text is lost and no header shown. What stands outside of any message, or on the commentary channel, is final
    text; an unknown channel is analysis. A message to a function is a call, whose first piece comes with its header;
    `tools` are the names of those that were offered, by which a recipient is recognised that is written oddly. A
    header without its `<|message|>` ends with the message: what follows the channel's name is the text. Reading ends
    at a stop token, and where another role's turn begins, which `has_left_turn` says.
    """

    def __init__(self, tokenizer: Tokenizer, tools: Sequence[str] = ()) -> None:
        names = (*STOP_TOKENS, START, CHANNEL, MESSAGE, END)
        self.num_tokens: collections.Counter[TextChannel] = collections.Counter()
        self.has_left_turn = False
        self._spelled = dict(zip(special_token_ids(tokenizer, names), names, strict=True))
        self._tokenizer = tokenizer
        self._tools = tuple(tools)
        self._text = Detokenizer(tokenizer)
        self._held: (
            list[int] | None
        ) = []  # tokens outside of messages, while they may be a header without its <|start|>
        self._header: list[int] | None = None  # the tokens of the header being read; None inside a body
        self._has_channel = False  # the header's first word is the channel, not the role
        self._recipient: str | None = None  # named behind the role, before the channel
        self._num_calls = 0
        self._channel: TextChannel = FINAL
        self._parallel: str | None = None  # the body of a call of several functions, until it is whole
        self._in_body = False  # the body has tokens
        self._written: set[TextChannel] = set()  # channels that had a body before
        self._stopped = False

    def is_control(self, token_id: int) -> bool:
        """Returns whether a token is no text."""
        return token_id in self._spelled

    def push(self, token_ids: Sequence[int]) -> Iterator[tuple[TextChannel, str]]:
        """Yields the text of further tokens; what follows a stop token is not read."""
        body: list[int] = []
        for token_id in token_ids:
            if self._stopped:
                break
            name = self._spelled.get(token_id)
            if name is not None:
                yield from self._read(body + self._released(name))
                body = []
                yield from self._control(name)
            elif self._header is not None:
                self._header.append(token_id)
            else:
                body += self._unless_held(token_id)
        yield from self._read(body)

    def finish(self, *, cut_off: bool) -> Iterator[tuple[TextChannel, str]]:
        """Ends the answer and yields what was held back; with `cut_off` what was unfinished is dropped."""
        held = self._released(None)
        yield from self._read([] if cut_off or RECIPIENT in self._decoded(held) else held)
        yield from self._end_header(is_call=False, cut_off=cut_off)
        yield from self._end_body(cut_off=cut_off)

    def _decoded(self, token_ids: list[int]) -> str:
        return decoded(self._tokenizer, token_ids)

    def _unless_held(self, token_id: int) -> list[int]:
        """Returns the tokens that are text: none while a header may have begun without its control token."""
        if self._held is None:
            return [token_id]
        self._held.append(token_id)
        return [] if _may_be_header(self._decoded(self._held)) else self._released(None)

    def _released(self, control_token: str | None) -> list[int]:
        """Returns the held tokens as text, or, before the rest of a header, makes them its beginning."""
        held, self._held = self._held or [], None
        if not held:
            return []
        if control_token not in (CHANNEL, MESSAGE) or not HEADER.fullmatch(self._decoded(held)):
            return held
        self._header = held
        return []

    def _read(self, token_ids: list[int]) -> Iterator[tuple[TextChannel, str]]:
        if not token_ids:
            return
        text = self._text.push(token_ids)
        if self._parallel is not None:
            self._parallel += text
            self._in_body = True
            return
        yield from self._separator()
        self.num_tokens[self._channel] += len(token_ids)
        yield self._channel, text

    def _separator(self) -> Iterator[tuple[TextChannel, str]]:
        """Yields what stands between two messages of one channel, at the beginning of the second."""
        if not self._in_body and self._channel in self._written:
            yield self._channel, "\n"
        self._in_body = True

    def _end_body(self, *, cut_off: bool) -> Iterator[tuple[TextChannel, str]]:
        rest = self._text.flush()
        if self._parallel is not None:
            body, self._parallel, self._in_body = self._parallel + ("" if cut_off else rest), None, False
            yield from self._calls_of(body)
        elif self._in_body:
            self._written.add(self._channel)
            self._in_body = False
            yield self._channel, "" if cut_off else rest

    def _control(self, name: str) -> Iterator[tuple[TextChannel, str]]:
        yield from self._end_body(cut_off=False)
        if name == CHANNEL:
            if self._header is not None and not self._has_channel:
                self._read_role(self._header)
            self._header, self._has_channel = [], True
        elif name == MESSAGE:
            if self._header is not None and not self._has_channel:
                self._read_role(self._header)
            if not self._stopped:
                yield from self._begin_body()
        else:
            yield from self._end_header(is_call=name == CALL, cut_off=False)
            self._recipient, self._has_channel, self._channel = None, False, FINAL
            self._header = [] if name == START else None
            self._held = [] if name == END else None
            self._stopped = name not in (START, END)

    def _read_role(self, header: list[int]) -> None:
        """Reads who speaks to whom; another role than the assistant ends the answer."""
        words = _words(self._decoded(header))
        if words and not words[0].startswith((ROLE, RECIPIENT)):
            self._stopped = self.has_left_turn = True
        self._recipient = _recipient_in(words)

    def _begin_body(self) -> Iterator[tuple[TextChannel, str]]:
        header, self._header = self._header or [], None
        words = _words(self._decoded(header))
        yield from self._open(self._recipient or _recipient_in(words), words[0] if self._has_channel and words else "")
        self._recipient, self._has_channel = None, False

    def _open(self, recipient: str | None, channel: str) -> Iterator[tuple[TextChannel, str]]:
        """Begins the body of a message to a recipient, if any, on a channel; yields the first piece of a call."""
        self._held = None
        function = None if recipient is None else self._function_of(recipient)
        if function is not None:
            self._channel = ToolChannel(self._num_calls, function)
            self._num_calls += 1
            yield self._channel, ""
        elif recipient == PARALLEL and self._tools:
            self._parallel = ""
        elif recipient is None and (not channel or channel.lower() in (FINAL, COMMENTARY)):
            self._channel = FINAL
        else:
            self._channel = ANALYSIS

    def _function_of(self, recipient: str) -> str | None:
        """Returns the function that a recipient names, or None."""
        name = recipient.removeprefix(FUNCTIONS)
        if name in self._tools:
            return name
        glued = [tool for tool in self._tools if name.startswith(tool) and name[len(tool) :] in TYPES]
        if len(glued) == 1:
            return glued[0]
        return name if name and recipient.startswith(FUNCTIONS) else None

    def _calls_of(self, body: str) -> Iterator[tuple[TextChannel, str]]:
        """Yields the calls in the argument of the parallel tool, or all of it as analysis where it has none."""
        try:
            uses = json.loads(body)["tool_uses"]
            found = [(self._function_of(use["recipient_name"]), json.dumps(use["parameters"])) for use in uses]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            found = []
        if not found or any(function not in self._tools for function, _ in found):
            self._channel = ANALYSIS
            yield from self._separator()
            self._written.add(ANALYSIS)
            self._in_body = False
            yield ANALYSIS, body
            return
        for function, arguments in found:
            assert function is not None, "one of the tools"
            call = ToolChannel(self._num_calls, function)
            self._num_calls += 1
            yield call, ""
            yield call, arguments

    def _end_header(self, *, is_call: bool, cut_off: bool) -> Iterator[tuple[TextChannel, str]]:
        """Yields the text of a header that has no `<|message|>`: what follows its channel and recipient."""
        header, self._header = self._header, None
        if not header:
            return
        text = self._decoded(header).replace(CONSTRAIN, " ")
        words = _words(text)
        if not self._has_channel:
            self._read_role(header)
            if self.has_left_turn:
                return
        recipient = self._recipient or _recipient_in(words)
        named = [words[0]] if words and not words[0].startswith(RECIPIENT) else []
        rest = text
        for word in [*named, *(word for word in words[:2] if word.startswith(RECIPIENT))]:
            rest = rest.partition(word)[2]
        if recipient is not None:
            kind = rest.split(None, 1)
            rest = rest if not kind or kind[0] not in TYPES else rest.partition(kind[0])[2]
        rest = rest.strip(" ") if recipient is None else rest.strip()
        if not rest or (recipient is not None and cut_off and not is_call):
            return
        yield from self._open(recipient, named[0] if named and self._has_channel else "")
        if self._parallel is not None:
            self._parallel = rest
        else:
            yield from self._separator()
            self.num_tokens[self._channel] += len(header)
            yield self._channel, rest
        yield from self._end_body(cut_off=False)


def _may_be_header(text: str) -> bool:
    """Returns whether a text outside of messages may be a header's beginning: the role, and a recipient behind it."""
    rest = text.lstrip()
    if ROLE.startswith(rest):
        return True
    rest = rest.removeprefix(ROLE).lstrip()
    return RECIPIENT.startswith(rest) or (rest.startswith(RECIPIENT) and len(rest.split()) == 1)


def _words(header: str) -> list[str]:
    return header.replace(CONSTRAIN, " ").split()


def _recipient_in(words: list[str]) -> str | None:
    """Returns whom a header is addressed to."""
    names = (word.removeprefix(RECIPIENT) for word in words if word.startswith(RECIPIENT))
    return next((name for name in names if name), None)


TextReader = PlainReader | ChannelReader


def chat_reader(tokenizer: Tokenizer, tools: Sequence[str] = ()) -> TextReader:
    """Returns the reader of the tokenizer's chat format; where that has no channels, all text is final."""
    has_channels = chat_format_of(tokenizer).has_channels
    return ChannelReader(tokenizer, tools) if has_channels else PlainReader(tokenizer, FINAL)
