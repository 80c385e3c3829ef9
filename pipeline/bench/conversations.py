"""The prompts of a benchmark's questions; later turns of a conversation hold the target's own answers."""

import dataclasses
import logging
from collections.abc import Callable, Sequence

import numpy as np

from pipeline.prompts.benchmarks import Question
from pipeline.prompts.channels import Channel, channel_tokens, channels
from pipeline.prompts.efforts import EffortMix
from pipeline.prompts.messages import Message
from pipeline.prompts.sources import Prompt, prompt_of
from pipeline.prompts.tokenizer import Tokenizer

log = logging.getLogger("pipeline")

Answers = Callable[[Sequence[Prompt]], list[str]]  # the target's final text for each prompt


def prompts_of(questions: Sequence[Question], effort: str | EffortMix, answers: Answers) -> list[Prompt]:
    """Returns a prompt for every turn of every question, in order; `answers` is asked where a later turn needs it.

    A conversation whose answer has no final text ends there.
    """
    spoken: list[list[Message]] = [[] for _ in questions]
    found: dict[tuple[int, int], Prompt] = {}
    turn, going_on = 0, list(range(len(questions)))
    while going_on:
        for index in going_on:
            question = questions[index]
            spoken[index].append(Message("user", question.turns[turn]))
            name = question.set_name if turn == 0 else f"{question.set_name} turn {turn + 1}"
            found[index, turn] = dataclasses.replace(prompt_of(spoken[index], effort), family=name)
        turn_before, turn = turn, turn + 1
        going_on = [index for index in going_on if turn < len(questions[index].turns)]
        texts = answers([found[index, turn_before] for index in going_on]) if going_on else []
        for index, text in zip(going_on, texts, strict=True):
            spoken[index].append(Message("assistant", text))
        silent = [index for index, text in zip(going_on, texts, strict=True) if not text.strip()]
        if silent:
            log.warning(
                "bench: %d of %d conversations end after turn %d, for the answer has no final text within "
                "bench.max_new_tokens",
                len(silent),
                len(texts),
                turn,
            )
        going_on = [index for index in going_on if index not in silent]
    return [found[key] for key in sorted(found)]


def final_text(token_ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Returns the text of an answer's final channel; of a chat format without channels all of it."""
    ids = np.array(token_ids, np.int64)
    is_final = channels(channel_tokens(tokenizer), ids, 0) == Channel.final
    text = tokenizer.decode(ids[is_final].tolist(), clean_up_tokenization_spaces=False)
    assert isinstance(text, str), "the text of one answer"
    return text
