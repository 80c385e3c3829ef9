"""The prompt sets that papers on speculative decoding measure on, from the hub or from a local copy, as they are asked.

The words around a question are those of the DFlash authors' benchmark (PyPI dflash==0.1.0, dflash/benchmark.py): what
a draft is worth depends on them. Alpaca, which that program lacks, is asked as it is written.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.artifacts.hashing import fingerprint_of
from pipeline.errors import PipelineError
from pipeline.prompts import files

STEP_BY_STEP = "{}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
PASS_THE_TESTS = "Write a solution to the following problem and make sure that it passes the tests:\n```python\n{}\n```"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkSet:
    """Says where a set is on the hub, which field of a row is the question (the first that there is), and its words.

    Where `added` names a field, its text follows the question on a line of its own.
    """

    dataset: str
    subset: str | None = None
    split: str = "test"
    fields: tuple[str, ...]
    words: str = "{}"
    added: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """Is what a user asks, turn by turn; a later turn follows the answer to the one before."""

    set_name: str
    turns: tuple[str, ...]


SETS = {
    "gsm8k": BenchmarkSet(dataset="openai/gsm8k", subset="main", fields=("question",), words=STEP_BY_STEP),
    "math500": BenchmarkSet(dataset="HuggingFaceH4/MATH-500", fields=("problem",), words=STEP_BY_STEP),
    "humaneval": BenchmarkSet(dataset="openai/openai_humaneval", fields=("prompt",), words=PASS_THE_TESTS),
    "mbpp": BenchmarkSet(dataset="google-research-datasets/mbpp", subset="sanitized", fields=("prompt", "text")),
    "mt-bench": BenchmarkSet(dataset="HuggingFaceH4/mt_bench_prompts", split="train", fields=("prompt", "turns")),
    "alpaca": BenchmarkSet(dataset="tatsu-lab/alpaca", split="train", fields=("instruction",), added="input"),
}


def questions(wanted: str, count: int) -> list[Question]:
    """Returns at most `count` distinct questions of a set, `NAME` on the hub or `NAME:PATH` of a copy.

    The order of the copy does not decide which. A copy is a file, as prompt files are, or what `datasets` reads. Raises
    PipelineError for a name that is no set's, for a copy that cannot be read and for rows without the question.
    """
    name, _, path = wanted.partition(":")
    if name not in SETS:
        raise PipelineError(
            f"bench.prompt_sets names {name!r}; it must be one of {', '.join(SETS)}, or one of them with a local copy: "
            "NAME:PATH"
        )
    one, source = SETS[name], path or SETS[name].dataset
    found = dict.fromkeys(_turns(one, row, f"{source}, {where}") for where, row in _rows(one, path))
    if not found:
        raise PipelineError(f"{source} holds no question; wanted the rows of {one.dataset}")
    chosen = set(sorted(found, key=lambda turns: fingerprint_of(["count", turns]))[:count])
    return [Question(set_name=name, turns=turns) for turns in found if turns in chosen]


def _rows(one: BenchmarkSet, path: str) -> files.Rows:
    if path and Path(path).is_file():
        return files.file_rows(Path(path))
    subset = None if path else one.subset
    dataset = files.load_dataset(path or one.dataset, one.split, subset, None)
    return ((f"row {index}", row) for index, row in enumerate(dataset))


def _turns(one: BenchmarkSet, row: Any, where: str) -> tuple[str, ...]:
    if isinstance(row, json.JSONDecodeError):
        raise PipelineError(f"{where} is not JSON ({row.msg} at column {row.colno})")
    fields = row if isinstance(row, Mapping) else {}
    asked = next((fields[field] for field in one.fields if fields.get(field)), None)
    turns = [asked] if isinstance(asked, str) else asked
    if (
        not isinstance(turns, Sequence)
        or not turns
        or not all(isinstance(turn, str) and turn.strip() for turn in turns)
    ):
        there = ", ".join(map(str, fields)) or "none"
        raise PipelineError(
            f"{where} has the fields {there}; wanted a question in {' or '.join(one.fields)}, as {one.dataset} has it"
        )
    added = fields.get(one.added) if one.added else None
    more = f"\n{added}" if isinstance(added, str) and added.strip() else ""
    return tuple(one.words.format(turn + more) for turn in turns)
