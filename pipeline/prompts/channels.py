"""Which of Harmony's channels each token of a conversation belongs to, from the control tokens alone.

Source: github.com/openai/harmony, docs/format.md: `<|start|>{role}<|channel|>{channel}<|message|>{text}<|end|>`.
"""

import dataclasses
import enum

import numpy as np
from jaxtyping import Int, UInt8

from pipeline.prompts.chat_format import chat_format_of
from pipeline.prompts.tokenizer import Tokenizer, special_token_ids


class Channel(enum.IntEnum):
    """What a token is; the numbers are stored. `other`: control tokens, headers and what is in no message."""

    prompt = 0
    analysis = 1
    commentary = 2
    final = 3
    other = 4


SPOKEN = (Channel.analysis, Channel.commentary, Channel.final)
ENDS = ("<|end|>", "<|return|>", "<|call|>", "<|endoftext|>")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChannelTokens:
    """A tokenizer's ids of what Harmony marks channels with; `names` are the ids that each channel's name begins with.

    Of a chat format without channels only `ends` are given.
    """

    ends: tuple[int, ...]
    start: int | None = None
    channel: int | None = None
    message: int | None = None
    names: tuple[tuple[int, ...], ...] = ()


def channel_tokens(tokenizer: Tokenizer) -> ChannelTokens:
    """What marks the channels of a tokenizer's chat format. PipelineError as `special_token_ids` raises it."""
    form = chat_format_of(tokenizer)
    if not form.has_channels:
        return ChannelTokens(ends=tuple(special_token_ids(tokenizer, form.stop_tokens)))
    start, channel, message, *ends = special_token_ids(tokenizer, ("<|start|>", "<|channel|>", "<|message|>", *ENDS))
    names = tuple(tuple(tokenizer.encode(one.name, add_special_tokens=False)) for one in SPOKEN)
    return ChannelTokens(start=start, channel=channel, message=message, ends=tuple(ends), names=names)


def channels(tokens: ChannelTokens, token_ids: Int[np.ndarray, " T"], prompt_tokens: int) -> UInt8[np.ndarray, " T"]:
    """The `Channel` of every token; the first `prompt_tokens` are the prompt, whatever they say.

    A message whose header names no channel is final, as the server takes it; one of a channel that Harmony does not
    have is other. Without channels in the chat format all that is answered is final.
    """
    outside = Channel.final if tokens.message is None else Channel.other
    found = np.full(len(token_ids), outside, np.uint8)
    control = [one for one in (tokens.start, tokens.channel, tokens.message) if one is not None]
    marks = np.flatnonzero(np.isin(token_ids, [*control, *tokens.ends]))
    found[marks] = Channel.other
    named = Channel.final  # by the header that is being read
    for mark, end in zip(marks, [*marks[1:], len(token_ids)], strict=True):
        if token_ids[mark] == tokens.message:
            found[mark + 1 : end] = named
        else:
            is_channel = token_ids[mark] == tokens.channel
            named = _named(tokens, token_ids[mark + 1 : end]) if is_channel else Channel.final
    found[:prompt_tokens] = Channel.prompt
    return found


def _named(tokens: ChannelTokens, header: Int[np.ndarray, " header"]) -> Channel:
    for channel, name in zip(SPOKEN, tokens.names, strict=True):
        if tuple(header[: len(name)].tolist()) == name:
            return channel
    return Channel.other
