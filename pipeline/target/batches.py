"""The embedded corpus as batches of a fixed number of tokens."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Int

from pipeline.prompts import corpus, harmony
from pipeline.prompts.chat_format import render_prompt
from pipeline.prompts.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """Token ids [B, T] padded on the right, and which of them are the assistant's, to be predicted [B, T]."""

    token_ids: Int[np.ndarray, "B T"]
    generated: Bool[np.ndarray, "B T"]


@dataclasses.dataclass(frozen=True)
class Example:
    """One conversation as tokens; the assistant's begin at `prompt_tokens`."""

    token_ids: Sequence[int]
    prompt_tokens: int


def tokenize(tokenizer: Tokenizer, conversations: Sequence[corpus.Conversation]) -> list[Example]:
    """Render conversations as serving does: the prompt by the chat template, then both channels."""
    examples = []
    for one in conversations:
        prompt = render_prompt(tokenizer, [{"role": "user", "content": one.prompt}], one.effort)
        completion = harmony.render_completion(tokenizer, one.analysis, one.final)
        examples.append(Example([*prompt, *completion], len(prompt)))
    return examples


def batch_schedule(
    examples: Sequence[Example], lengths: Sequence[int], batch_tokens: int, seed: int
) -> Iterator[TokenBatch]:
    """Endless batches, a function of the arguments alone: shuffled each epoch, short and long rows apart.

    Every row of a batch has one of `lengths` positions (ascending), so that few programs are compiled and
    little is padding; examples longer than the last are left out.
    """
    usable = [index for index, one in enumerate(examples) if len(one.token_ids) <= lengths[-1]]
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
    """Examples as rows of `length` positions."""
    token_ids = np.zeros((len(examples), length), np.int32)
    generated = np.zeros((len(examples), length), bool)
    for row, example in enumerate(examples):
        count = len(example.token_ids)
        token_ids[row, :count] = example.token_ids
        generated[row, example.prompt_tokens : count] = True
    return TokenBatch(token_ids, generated)
