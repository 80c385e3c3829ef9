"""Reads prompts from two embedded generators, files, or a dataset on the hub or on disk."""

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.artifacts.hashing import fingerprint_of
from pipeline.errors import PipelineError
from pipeline.prompts import files, shapes
from pipeline.prompts.corpus import conversation
from pipeline.prompts.efforts import EffortMix
from pipeline.prompts.everyday.requests import request
from pipeline.prompts.messages import Message, effort_problem, message_of
from pipeline.prompts.shapes import LeftOut, Row
from pipeline.prompts.tools import Tool, tools_of

log = logging.getLogger("pipeline")

SHOWN_ROWS = 10
DRAWS_PER_PROMPT = 20
Draw = Callable[[int], tuple[str, str | None]]  # the text and the family of the prompt of an index
PROMPT = "prompt"  # the column of texts unless another is named

Answer = Sequence[Mapping[str, Any]]  # the assistant's turns at the end of a row, in the shape of OpenAI's API


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Holds the messages that the target answers, and the functions that it may call.

    `prompt_id` is the sha256 of the canonical JSON of the messages, or of messages and tools, without the effort.
    `family` is the kind of question, where the source knows it.
    """

    prompt_id: str
    messages: tuple[Message, ...]
    effort: str
    tools: tuple[Tool, ...] = ()
    family: str | None = None


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """Holds distinct prompts in the source's order; counts those dropped as repeated, over a limit, or not readable.

    `answers` are those of the prompts' own rows by prompt id, where they are read (`Reading`).
    """

    prompts: tuple[Prompt, ...]
    num_duplicates: int
    num_over: int = 0
    num_left_out: int = 0
    answers: Mapping[str, Answer] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """Says how rows are read: in which shape (None: their fields say it), and whether bad rows are left out (`skips`).

    With `takes_answers` the answer at the end of a row is read too, and a row without one is a bad row.
    """

    shape: str | None = None
    skips: bool = False
    takes_answers: bool = False


PROMPTS_ALONE = Reading()


def prompt_of(messages: Iterable[Message], effort: str | EffortMix, tools: Iterable[Tool] = ()) -> Prompt:
    """Returns the prompt of `messages` and `tools`, with its id; from a mix its effort is drawn by that id."""
    messages, tools = tuple(messages), tuple(tools)
    content: Any = [message.as_dict() for message in messages]
    if tools:
        content = {"messages": content, "tools": [dataclasses.asdict(tool) for tool in tools]}
    prompt_id = fingerprint_of(content)
    return Prompt(prompt_id, messages, effort if isinstance(effort, str) else effort.of(prompt_id), tools)


def limited(found: PromptSet, count: int | None) -> PromptSet:
    """Returns at most `count` prompts of a set, in its order: those whose ids come first when hashed again.

    The choice does not depend on the set's order, and a larger count includes the prompts of a smaller one. Ids are
    hashed again because the ids themselves decide which prompts are held out.
    """
    if count is None or count >= len(found.prompts):
        return found
    chosen = sorted(found.prompts, key=lambda prompt: fingerprint_of(["count", prompt.prompt_id]))[:count]
    chosen_ids = {prompt.prompt_id for prompt in chosen}
    prompts = tuple(prompt for prompt in found.prompts if prompt.prompt_id in chosen_ids)
    return dataclasses.replace(found, prompts=prompts, num_over=len(found.prompts) - len(prompts))


def generated(seed: int, count: int, effort: str | EffortMix) -> PromptSet:
    """Returns the first `count` distinct prompts of the tiny target's corpus."""

    def write(index: int) -> tuple[str, str | None]:
        drawn = conversation(seed, index)
        return drawn.prompt, drawn.family

    return _drawn(write, count, effort, "embedded corpus")


def everyday(seed: int, count: int, effort: str | EffortMix) -> PromptSet:
    """Returns the first `count` distinct requests in plain English."""
    return _drawn(lambda index: (request(seed, index), None), count, effort, "generator of everyday requests")


def _drawn(write: Draw, count: int, effort: str | EffortMix, source: str) -> PromptSet:
    _check_effort(effort)
    if count < 1:
        raise PipelineError(f"the number of generated prompts is {count}; it must be positive")
    found: dict[str, Prompt] = {}
    for index in range(count * DRAWS_PER_PROMPT):
        text, family = write(index)
        prompt = prompt_of([Message("user", text)], effort)
        found.setdefault(prompt.prompt_id, dataclasses.replace(prompt, family=family))
        if len(found) == count:
            return PromptSet(tuple(found.values()), index + 1 - count)
    raise PipelineError(
        f"the {source} gave {len(found)} distinct prompts in {count * DRAWS_PER_PROMPT} draws, wanted "
        f"{count}; ask for fewer, or bring your own as JSONL"
    )


def from_files(paths: Sequence[Path], effort: str | EffortMix, reading: Reading = PROMPTS_ALONE) -> PromptSet:
    """Returns the prompts of files, in the order of the files (docs/guide/data.md has the shapes of their rows).

    A row's `effort` or `reasoning_effort` overrides the argument. Raises PipelineError with the number and the problem
    of every bad row, unless those are left out, and always for lines that are no JSON, for rows that can be read in
    two ways, and where nothing is left.
    """
    _check_effort(effort)
    read = [_read(files.file_rows(path), effort, reading, str(path)) for path in paths]
    return _distinct(read, str(paths[0]) if len(paths) == 1 else f"{paths[0]} to {paths[-1]}")


def from_dataset(
    name: str,
    split: str,
    column: str,
    effort: str | EffortMix,
    reading: Reading = PROMPTS_ALONE,
    *,
    subset: str | None = None,
    revision: str | None = None,
) -> PromptSet:
    """Returns the prompts of one column of a dataset (texts, or lists of messages), with its columns in ROW_FIELDS.

    `name` is a hub id, a local json, jsonl, csv, parquet or txt file, or a local directory: of such files, or written
    by `save_to_disk`. A hub dataset can be revised in place: `revision` pins it. Where the column PROMPT is missing,
    or the shape has others, the columns are read as the fields of a file's rows are. Raises PipelineError when the
    dataset cannot be loaded, and as `from_files` does.
    """
    _check_effort(effort)
    dataset = files.load_dataset(name, split, subset, revision)
    columns, names = dataset.column_names, [column]
    if column == PROMPT and (column not in columns or reading.shape not in (None, PROMPT)):
        names = [field for fields in shapes.FIELDS.values() for field in fields if field in columns] or names
    if names[0] not in columns:
        raise PipelineError(f"dataset {name} has no column {column!r}; wanted one of {', '.join(columns)}")
    is_row = names != [column]
    beside = (*shapes.ROW_FIELDS, *(shapes.ALPACA_FIELDS if is_row else ()))
    names += [field for field in beside if field in columns and field not in names]
    values = (files.without_nulls(list(row)) for row in zip(*(dataset[field] for field in names), strict=True))
    fields = (dict(zip(names, row, strict=True)) for row in values)
    rows = (row if is_row else _row_of(row.pop(column), reading.shape) | row for row in fields)
    source = f"dataset {name} ({split}, {column})"
    numbered = ((f"row {index}", row) for index, row in enumerate(rows))
    return _distinct([_read(numbered, effort, reading, source)], source)


def _row_of(value: Any, shape: str | None) -> dict[str, Any]:
    """Returns a column's value as a row of a file; a text that is a conversation's JSON can be read as both."""
    if shape is not None:
        return {shapes.FIELDS[shape][0]: value}
    if isinstance(value, str):
        return {PROMPT: value, "messages": value} if shapes.conversation_in(value) else {PROMPT: value}
    is_sharegpt = isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "from" in value[0]
    return {"conversations" if is_sharegpt else "messages": value}


@dataclasses.dataclass
class _Part:
    """Holds the prompts of one file or dataset with their answers, and how many rows are left out."""

    prompts: list[Prompt] = dataclasses.field(default_factory=list)
    answers: list[Answer] = dataclasses.field(default_factory=list)  # empty ones unless answers are taken
    num_left_out: int = 0


def _read(rows: files.Rows, effort: str | EffortMix, reading: Reading, source: str) -> _Part:
    """Returns what one file or dataset holds, after a line in the log."""
    part = _Part()
    read: list[Row] = []
    bad: list[tuple[str, LeftOut]] = []
    is_torn, num_answered = False, 0
    for where, row in rows:
        found = _broken(row) or _shaped(row, reading, f"{source}, {where}")
        is_torn = is_torn or isinstance(row, json.JSONDecodeError)
        if isinstance(found, LeftOut):
            bad.append((where, found))
            continue
        part.prompts.append(prompt_of(map(message_of, found.messages), found.effort or effort, tools_of(found.tools)))
        part.answers.append(tuple(found.answer) if reading.takes_answers else ())
        num_answered += bool(found.answer)
        read.append(dataclasses.replace(found, messages=(), tools=(), answer=()))
    if bad and not read and all(reason.kind == shapes.NO_ANSWER for _, reason in bad):
        raise PipelineError(
            f"{source} has no answer at the end of any of its {len(bad)} rows, which teacher_cache.generator=given "
            "takes; give conversations whose last turn is the assistant's, or let the target answer: "
            "teacher_cache.generator=engine"
        )
    if bad and (is_torn or not reading.skips or not read):
        more = [f"and {len(bad) - SHOWN_ROWS} more"] if len(bad) > SHOWN_ROWS else []
        listed = "\n  ".join([f"{where}: {problem}" for where, problem in bad[:SHOWN_ROWS]] + more)
        raise PipelineError(
            f"{source} has {len(bad)} bad rows of {len(bad) + len(read)}; mend or delete them:\n  {listed}"
        )
    if read:
        becomes = "taken" if reading.takes_answers else "left out"
        answers = [f"the answer at the end of {num_answered:,} {becomes}"] if num_answered else []
        log.log(logging.WARNING if bad else logging.INFO, "prompts: %s: %s", source, _summary(read, bad, answers))
    part.num_left_out = len(bad)
    return part


def _broken(row: Any) -> LeftOut | None:
    if not isinstance(row, json.JSONDecodeError):
        return None
    return LeftOut(f"is not JSON ({row.msg} at column {row.colno}); wanted one object a line")


def _shaped(row: Any, reading: Reading, where: str) -> Row | LeftOut:
    try:
        found = shapes.read(row, reading.shape)
    except PipelineError as error:
        raise PipelineError(f"{where} {error}") from error
    is_silent = isinstance(found, Row) and not found.answer
    return LeftOut(None, shapes.NO_ANSWER) if reading.takes_answers and is_silent else found


def _summary(read: Sequence[Row], bad: Sequence[tuple[str, LeftOut]], answers: Sequence[str]) -> str:
    """Returns in one line how rows were read and which were not: `4,812 ShareGPT rows, 37 without a user turn ...`."""
    counts = Counter(shapes.TITLES[row.shape] for row in read)
    titles = [*counts] if len(counts) == 1 else [f"{count:,} {title}" for title, count in counts.items()]
    parts = [f"{len(read) + len(bad):,} {' and '.join(titles)} rows"]
    for kind in dict.fromkeys(reason.kind for _, reason in bad):
        numbers = [where.split()[-1] for where, reason in bad if reason.kind == kind]
        more = ", ..." if len(numbers) > SHOWN_ROWS else ""
        first = next(reason for _, reason in bad if reason.kind == kind)
        why = f" (the first {first})" if kind == shapes.NOT_READABLE else ""
        parts.append(f"{len(numbers):,} {kind} left out: rows {', '.join(numbers[:SHOWN_ROWS])}{more}{why}")
    return ", ".join([*parts, *answers]) + "".join(
        f"; {text}" for text in dict.fromkeys(row.unread for row in read) if text
    )


def _distinct(parts: Sequence[_Part], source: str) -> PromptSet:
    rows = [row for part in parts for row in zip(part.prompts, part.answers, strict=True)]
    found: dict[str, tuple[Prompt, Answer]] = {}
    num_others = 0
    for prompt, answer in rows:
        _, first = found.setdefault(_without_spaces(prompt), (prompt, answer))
        num_others += answer != first
    if not found:
        raise PipelineError(f'{source} holds no prompt; wanted at least one row such as {{"prompt": "Hi"}}')
    if num_others:
        log.warning(
            "prompts: %s: %d rows repeat a prompt with another answer, which is left out: the first row's is taken",
            source,
            num_others,
        )
    return PromptSet(
        tuple(prompt for prompt, _ in found.values()),
        len(rows) - len(found),
        num_left_out=sum(part.num_left_out for part in parts),
        answers={prompt.prompt_id: answer for prompt, answer in found.values() if answer},
    )


def _without_spaces(prompt: Prompt) -> str:
    """Returns a key that is equal for prompts that differ in white space alone."""
    texts = [[message.role, message.content.split(), message.thinking] for message in prompt.messages]
    calls = [[call.as_dict() for call in message.tool_calls] for message in prompt.messages]
    return fingerprint_of([texts, calls, [tool.as_dict() for tool in prompt.tools]])


def _check_effort(effort: str | EffortMix) -> None:
    problem = effort_problem(effort) if isinstance(effort, str) else None
    if problem is not None:
        raise PipelineError(problem)
