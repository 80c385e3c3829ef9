"""Where prompts come from: two embedded generators, a JSONL file, a dataset on the hub or on disk."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from pipeline.artifacts import PipelineError, fingerprint_of
from pipeline.prompts.corpus import conversation
from pipeline.prompts.everyday.requests import request
from pipeline.prompts.messages import Message, effort_problem, messages_problem

SHOWN_ROWS = 10
DRAWS_PER_PROMPT = 20
FILE_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What the target is asked. `prompt_id` is the sha256 of the messages' canonical JSON, without effort."""

    prompt_id: str
    messages: tuple[Message, ...]
    effort: str


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """Distinct prompts in the source's order, and how many repeated ones were dropped."""

    prompts: tuple[Prompt, ...]
    num_duplicates: int


def prompt_of(messages: Iterable[Message], effort: str) -> Prompt:
    """The prompt made of `messages`, with its id."""
    messages = tuple(messages)
    return Prompt(fingerprint_of([message.as_dict() for message in messages]), messages, effort)


def generated(seed: int, count: int, effort: str) -> PromptSet:
    """The first `count` distinct prompts of the tiny target's corpus."""
    _check_effort(effort)
    return _drawn(lambda index: conversation(seed, index, effort).prompt, count, effort, "embedded corpus")


def everyday(seed: int, count: int, effort: str) -> PromptSet:
    """The first `count` distinct requests in plain English."""
    _check_effort(effort)
    return _drawn(lambda index: request(seed, index), count, effort, "generator of everyday requests")


def _drawn(write: Callable[[int], str], count: int, effort: str, source: str) -> PromptSet:
    if count < 1:
        raise PipelineError(f"the number of generated prompts is {count}; it must be positive")
    found: dict[str, Prompt] = {}
    for index in range(count * DRAWS_PER_PROMPT):
        prompt = prompt_of([Message("user", write(index))], effort)
        found.setdefault(prompt.prompt_id, prompt)
        if len(found) == count:
            return PromptSet(tuple(found.values()), index + 1 - count)
    raise PipelineError(
        f"the {source} gave {len(found)} distinct prompts in {count * DRAWS_PER_PROMPT} draws, wanted "
        f"{count}; ask for fewer, or bring your own as JSONL"
    )


def from_jsonl(path: Path, effort: str) -> PromptSet:
    """Prompts of a JSONL file: rows `{"prompt": text}` or `{"messages": [{"role", "content"}]}`.

    A row's own `effort` or `reasoning_effort` goes before the argument; other fields are not read. Raises one
    PipelineError with the number and problem of every bad line.
    """
    _check_effort(effort)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise PipelineError(f"cannot read prompts from {path} ({error}); give a JSONL file in UTF-8") from error
    rows = ((f"line {number}", line) for number, line in enumerate(lines, start=1) if line.strip())
    return _collected(((where, _parsed(line)) for where, line in rows), effort, str(path))


def from_dataset(
    name: str, split: str, column: str, effort: str, *, subset: str | None = None, revision: str | None = None
) -> PromptSet:
    """Prompts of one column (texts, or lists of messages) of a dataset.

    `name` is a hub id, a local directory, or a local json, jsonl, csv, parquet or txt file. A hub dataset can
    be revised in place: `revision` pins it. Raises PipelineError when it cannot be loaded or a row is bad.
    """
    _check_effort(effort)
    dataset = _loaded(name, split, subset, revision)
    if column not in dataset.column_names:
        raise PipelineError(f"dataset {name} has no column {column!r}; wanted one of {', '.join(dataset.column_names)}")
    values = enumerate(dataset[column])
    rows = ((f"row {i}", {"prompt" if isinstance(value, str) else "messages": value}) for i, value in values)
    return _collected(rows, effort, f"dataset {name} ({split}, {column})")


def _loaded(name: str, split: str, subset: str | None, revision: str | None) -> Any:
    import datasets  # here: it takes a second to import and most runs do without it

    path = Path(name)
    try:
        if path.is_file():
            if path.suffix not in FILE_FORMATS:
                raise PipelineError(f"{path} ends in {path.suffix!r}; wanted one of {', '.join(FILE_FORMATS)}")
            return datasets.load_dataset(FILE_FORMATS[path.suffix], data_files=str(path), split=split)
        return datasets.load_dataset(name, subset, split=split, revision=revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise PipelineError(
            f"cannot load dataset {name}, split {split} ({type(error).__name__}: {error}); check the "
            "name, the split and the network, or give a local directory or file"
        ) from error


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return error


def _collected(rows: Iterator[tuple[str, Any]], effort: str, source: str) -> PromptSet:
    found: dict[str, Prompt] = {}
    num_rows, bad = 0, []
    for where, row in rows:
        num_rows += 1
        problem = _row_problem(row)
        if problem is not None:
            bad.append(f"{where}: {problem}")
            continue
        prompt = _prompt_of_row(row, effort)
        found.setdefault(prompt.prompt_id, prompt)
    if bad:
        more = [f"and {len(bad) - SHOWN_ROWS} more"] if len(bad) > SHOWN_ROWS else []
        listed = "\n  ".join(bad[:SHOWN_ROWS] + more)
        raise PipelineError(f"{source} has {len(bad)} bad rows of {num_rows}; mend or delete them:\n  {listed}")
    if not found:
        raise PipelineError(f'{source} holds no prompt; wanted at least one row such as {{"prompt": "Hi"}}')
    return PromptSet(tuple(found.values()), num_rows - len(found))


def _row_problem(row: Any) -> str | None:
    if isinstance(row, json.JSONDecodeError):
        return f"is not JSON ({row.msg} at column {row.colno}); wanted one object a line"
    if not isinstance(row, dict):
        return f"is a {type(row).__name__}; wanted an object with prompt or messages"
    if ("prompt" in row) == ("messages" in row):
        fields = ", ".join(map(str, row)) or "none"
        return f"has the fields {fields}; wanted exactly one of prompt and messages"
    if "prompt" in row and not (isinstance(row["prompt"], str) and row["prompt"].strip()):
        return f"has prompt {row['prompt']!r}; wanted a non-empty string"
    efforts = [row[key] for key in ("effort", "reasoning_effort") if row.get(key) is not None]
    if len(efforts) == 2 and efforts[0] != efforts[1]:
        return f"has effort {efforts[0]!r} and reasoning_effort {efforts[1]!r}; wanted one of them"
    problem = effort_problem(efforts[0]) if efforts else None
    return problem or (messages_problem(row["messages"]) if "messages" in row else None)


def _prompt_of_row(row: dict[str, Any], effort: str) -> Prompt:
    messages = row["messages"] if "messages" in row else [{"role": "user", "content": row["prompt"]}]
    own = row.get("effort") or row.get("reasoning_effort")
    return prompt_of((Message(message["role"], message["content"]) for message in messages), own or effort)


def _check_effort(effort: str) -> None:
    problem = effort_problem(effort)
    if problem is not None:
        raise PipelineError(problem)
