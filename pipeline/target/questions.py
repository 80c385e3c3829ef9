"""Divides the embedded corpus into conversations to train on and questions that the target has never seen."""

import itertools
from collections.abc import Iterator

from pipeline.errors import PipelineError
from pipeline.prompts import corpus
from pipeline.prompts.corpus import Conversation
from pipeline.prompts.messages import Message
from pipeline.prompts.sources import prompt_of
from pipeline.prompts.split import is_heldout

HELD_OUT_SHARE = 1 / 32  # of all questions: those that a draft's training holds out by default are held out here too
MAX_HELD_OUT = 4_000  # conversations about them that are drawn, to find enough of every family
TRAINING_SEED, HELD_OUT_SEED = 1_000_000, 2_000_000  # prompt sets are drawn with the seed itself


def training_conversations(seed: int, count: int) -> Iterator[Conversation]:
    """Yields `count` conversations, none of them about a question that is held out."""
    return itertools.islice(_drawn(TRAINING_SEED + seed, held_out=False), count)


def held_out_conversations(seed: int, per_family: int) -> list[Conversation]:
    """Returns `per_family` conversations of each family, all about questions that no training has, none twice.

    Raises PipelineError when a family has fewer: the smallest have about twenty.
    """
    found: dict[str, dict[str, Conversation]] = {family.__name__: {} for family in corpus.FAMILIES}
    for each in itertools.islice(_drawn(HELD_OUT_SEED + seed, held_out=True), MAX_HELD_OUT):
        of_family = found[each.family]
        if len(of_family) < per_family:
            of_family.setdefault(each.prompt, each)
        elif all(len(others) == per_family for others in found.values()):
            return [each for of_family in found.values() for each in of_family.values()]
    fewest = min(found, key=lambda family: len(found[family]))
    raise PipelineError(
        f"the family {fewest} has {len(found[fewest])} questions that are held out; {per_family} of each are wanted"
    )


def _drawn(seed: int, *, held_out: bool) -> Iterator[Conversation]:
    for index in itertools.count():
        each = corpus.conversation(seed, index)
        question = prompt_of([Message("user", each.prompt)], each.effort)
        if is_heldout(question.prompt_id, HELD_OUT_SHARE) == held_out:
            yield each
