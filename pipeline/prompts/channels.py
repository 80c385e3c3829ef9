"""Finds the Harmony channel of each token of a conversation from the control tokens alone.

Source: github.com/openai/harmony, docs/format.md: `<|start|>{role}<|channel|>{channel}<|message|>{text}<|end|>`.
"""

import dataclasses
import enum

import numpy as np
from jaxtyping import Int, UInt8

from pipeline.prompts.chat_format import chat_format_of
from pipeline.prompts.tokenizer import Tokenizer, special_token_ids


class Channel(enum.IntEnum):
    """Lists what a token can be; the numbers are stored. `other`: control tokens, headers, text outside of messages."""

    prompt = 0
    analysis = 1
    commentary = 2
    final = 3
    other = 4


SPOKEN = (Channel.analysis, Channel.commentary, Channel.final)
ENDS = ("<|end|>", "<|return|>", "<|call|>", "<|endoftext|>")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChannelTokens:
    """Holds the ids of the tokens that mark channels; `names` are the ids that each channel's name begins with.

    For a chat format without channels only `ends` is set.
    """

    ends: tuple[int, ...]
    start: int | None = None
    channel: int | None = None
    message: int | None = None
    names: tuple[tuple[int, ...], ...] = ()


def channel_tokens(tokenizer: Tokenizer) -> ChannelTokens:
    """Returns the tokens that mark channels in a tokenizer's chat format; raises PipelineError when one is missing."""
    chat_format = chat_format_of(tokenizer)
    if not chat_format.has_channels:
        return ChannelTokens(ends=tuple(special_token_ids(tokenizer, chat_format.stop_tokens)))
    start, channel_mark, message, *ends = special_token_ids(
        tokenizer, ("<|start|>", "<|channel|>", "<|message|>", *ENDS)
    )
    names = tuple(tuple(tokenizer.encode(channel.name, add_special_tokens=False)) for channel in SPOKEN)
    return ChannelTokens(start=start, channel=channel_mark, message=message, ends=tuple(ends), names=names)


def channels(tokens: ChannelTokens, token_ids: Int[np.ndarray, " T"], prompt_tokens: int) -> UInt8[np.ndarray, " T"]:
    """Returns the `Channel` of every token; the first `prompt_tokens` are the prompt, whatever they contain.

    A message whose header names no channel is final, as in the server; a message in a channel that Harmony does not
    have is other. In a chat format without channels the whole answer is final.
    """
    outside = Channel.final if tokens.message is None else Channel.other
    found = np.full(len(token_ids), outside, np.uint8)
    control = [token for token in (tokens.start, tokens.channel, tokens.message) if token is not None]
    marks = np.flatnonzero(np.isin(token_ids, [*control, *tokens.ends]))
    found[marks] = Channel.other
    named = Channel.final  # the channel that the current header names
    for mark, end in zip(marks, [*marks, len(token_ids)][1:], strict=True):
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
