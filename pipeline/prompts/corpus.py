"""Generates the embedded corpus: templated conversations that a tiny model learns in minutes.

The answer is a function of the question and the effort, so that only the prompt is random. Numbers are small and
every step is written out, because four narrow layers cannot do two steps at once.
"""

import dataclasses
import random
from collections.abc import Iterable, Iterator

from pipeline.errors import PipelineError
from pipeline.prompts.families import functions, numbers, sequences, tables, words
from pipeline.prompts.families.exchange import Exchange
from pipeline.prompts.messages import EFFORTS, effort_problem

FAMILIES = (
    numbers.addition,
    numbers.subtraction,
    numbers.multiplication,
    numbers.story_problem,
    numbers.conversion,
    sequences.counting,
    sequences.continuation,
    sequences.ordering,
    sequences.extreme,
    sequences.parity,
    words.letters,
    words.repetition,
    words.tally,
    words.weekday,
    functions.definition,
    functions.branch,
    functions.loop,
    tables.pairs_table,
    tables.times_table,
    tables.json_object,
)
OPENINGS = ("", "", "Please help. ", "Task: ", "Question: ")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversation:
    """Holds one user turn and both channels of its answer, as plain text; `family` is the kind of the question."""

    family: str
    prompt: str
    effort: str
    analysis: str
    final: str


def conversation(seed: int, index: int, effort: str | None = None) -> Conversation:
    """Returns the `index`-th conversation of the corpus `seed`; without `effort` one of the three is drawn.

    The prompt and the final answer do not depend on the effort, the analysis grows with it. Raises
    PipelineError for an unknown effort.
    """
    problem = effort_problem(effort) if effort is not None else None
    if problem is not None:
        raise PipelineError(problem)
    rng = random.Random(f"{seed}/{index}")
    drawn = rng.choice(EFFORTS)  # drawn in any case: the prompt must not depend on who chose the effort
    effort = drawn if effort is None else effort
    opening = rng.choice(OPENINGS)
    family = rng.choice(FAMILIES)
    exchange = family(rng)
    return Conversation(
        family=family.__name__,
        prompt=opening + exchange.question,
        effort=effort,
        analysis=_analysis(exchange, effort),
        final=exchange.answer,
    )


def texts(conversations: Iterable[Conversation]) -> Iterator[str]:
    """Yields every text of the conversations separately, to train a tokenizer on them."""
    for each in conversations:
        yield from (each.prompt, each.analysis, each.final)


def _analysis(exchange: Exchange, effort: str) -> str:
    parts = {
        "low": (exchange.steps,),
        "medium": (exchange.plan, exchange.steps),
        "high": (exchange.plan, exchange.steps, exchange.check),
    }
    return " ".join(parts[effort])
