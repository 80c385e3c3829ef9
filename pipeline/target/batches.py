"""Arranges the embedded corpus in batches of a fixed number of tokens."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Int

from pipeline.prompts import corpus, harmony
from pipeline.prompts.chat_format import render_prompt
from pipeline.prompts.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """Holds token ids [B, T], padded on the right; `generated` [B, T] marks the assistant's, which are predicted."""

    token_ids: Int[np.ndarray, "B T"]
    generated: Bool[np.ndarray, "B T"]


@dataclasses.dataclass(frozen=True)
class Example:
    """Holds one conversation as tokens; the assistant's begin at index `prompt_tokens`."""

    token_ids: Int[np.ndarray, " T"]
    prompt_tokens: int


def bucket_lengths(longest: int) -> tuple[int, ...]:
    """Returns the lengths that rows are padded to, in positions: few programs, and little padding between them."""
    return tuple(longest * eighths // 8 for eighths in range(4, 9))


def tokenize(tokenizer: Tokenizer, conversations: Iterable[corpus.Conversation]) -> list[Example]:
    """Renders conversations as serving does: the prompt by the chat template, then both channels."""
    examples = []
    for conversation in conversations:
        prompt = render_prompt(tokenizer, [{"role": "user", "content": conversation.prompt}], conversation.effort)
        completion = harmony.render_completion(tokenizer, conversation.analysis, conversation.final)
        examples.append(Example(np.array([*prompt, *completion], np.int32), len(prompt)))
    return examples


def batch_schedule(
    examples: Sequence[Example], lengths: Sequence[int], batch_tokens: int, seed: int
) -> Iterator[TokenBatch]:
    """Yields endless batches that depend on the arguments alone: shuffled each epoch, grouped by length.

    All rows of a batch have the same of the `lengths` (ascending, in positions), so that few programs are compiled
    and there is little padding. Examples longer than the last length are left out.
    """
    usable = [index for index, example in enumerate(examples) if len(example.token_ids) <= lengths[-1]]
    epoch = 0
    waiting: dict[int, list[Example]] = {length: [] for length in lengths}
    while True:
        for index in np.random.default_rng([seed, epoch]).permutation(usable):
            example = examples[index]
            length = next(length for length in lengths if len(example.token_ids) <= length)
            waiting[length].append(example)
            if len(waiting[length]) == batch_tokens // length:
                yield pad(waiting.pop(length), length)
                waiting[length] = []
        epoch += 1


def pad(examples: Sequence[Example], length: int) -> TokenBatch:
    """Returns examples as rows of `length` positions."""
    token_ids = np.zeros((len(examples), length), np.int32)
    generated = np.zeros((len(examples), length), bool)
    for row, example in enumerate(examples):
        count = len(example.token_ids)
        token_ids[row, :count] = example.token_ids
        generated[row, example.prompt_tokens : count] = True
    return TokenBatch(token_ids, generated)
