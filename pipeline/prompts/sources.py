"""Reads prompts from two embedded generators, a JSONL file, or a dataset on the hub or on disk."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from pipeline.artifacts.hashing import fingerprint_of
from pipeline.errors import PipelineError
from pipeline.prompts.corpus import conversation
from pipeline.prompts.efforts import EffortMix
from pipeline.prompts.everyday.requests import request
from pipeline.prompts.messages import Message, effort_problem, message_of, messages_problem
from pipeline.prompts.tools import Tool, tools_of, tools_problem

SHOWN_ROWS = 10
DRAWS_PER_PROMPT = 20
ROW_FIELDS = ("tools", "effort", "reasoning_effort")  # read beside the prompt or the messages
SAVED = ("dataset_dict.json", "state.json")  # what `datasets` writes beside saved splits, and in one
FILE_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Holds the messages that the target answers, and the functions that it may call.

    `prompt_id` is the sha256 of the canonical JSON of the messages, or of messages and tools, without the effort.
    """

    prompt_id: str
    messages: tuple[Message, ...]
    effort: str
    tools: tuple[Tool, ...] = ()


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """Holds distinct prompts in the source's order; counts those dropped as repeated, or as over a limit."""

    prompts: tuple[Prompt, ...]
    num_duplicates: int
    num_over: int = 0


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
    return PromptSet(prompts, found.num_duplicates, len(found.prompts) - len(prompts))


def generated(seed: int, count: int, effort: str | EffortMix) -> PromptSet:
    """Returns the first `count` distinct prompts of the tiny target's corpus."""
    return _drawn(lambda index: conversation(seed, index).prompt, count, effort, "embedded corpus")


def everyday(seed: int, count: int, effort: str | EffortMix) -> PromptSet:
    """Returns the first `count` distinct requests in plain English."""
    return _drawn(lambda index: request(seed, index), count, effort, "generator of everyday requests")


def _drawn(write: Callable[[int], str], count: int, effort: str | EffortMix, source: str) -> PromptSet:
    _check_effort(effort)
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


def from_jsonl(path: Path, effort: str | EffortMix) -> PromptSet:
    """Returns the prompts of a JSONL file: rows `{"prompt": text}` or `{"messages": [...]}`, with optional `tools`.

    Messages and tools have OpenAI's shape; `tools` is a list or its JSON. A row's `effort` or `reasoning_effort`
    overrides the argument; other fields are not read. Raises one PipelineError with the number and the problem of
    every bad line.
    """
    _check_effort(effort)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise PipelineError(f"cannot read prompts from {path} ({error}); give a JSONL file in UTF-8") from error
    rows = ((f"line {number}", line) for number, line in enumerate(lines, start=1) if line.strip())
    return _collected(((where, _parsed(line)) for where, line in rows), effort, str(path))


def from_dataset(
    name: str,
    split: str,
    column: str,
    effort: str | EffortMix,
    *,
    subset: str | None = None,
    revision: str | None = None,
) -> PromptSet:
    """Returns the prompts of one column of a dataset (texts, or lists of messages), with its columns in ROW_FIELDS.

    `name` is a hub id, a local json, jsonl, csv, parquet or txt file, or a local directory: of such files, or written
    by `save_to_disk`. A hub dataset can be revised in place: `revision` pins it. Raises PipelineError when it cannot be
    loaded or a row is bad.
    """
    _check_effort(effort)
    dataset = _loaded(name, split, subset, revision)
    if column not in dataset.column_names:
        raise PipelineError(f"dataset {name} has no column {column!r}; wanted one of {', '.join(dataset.column_names)}")
    others = [field for field in ROW_FIELDS if field in dataset.column_names and field != column]
    values = enumerate(zip(*(dataset[field] for field in (column, *others)), strict=True))
    rows = (
        (f"row {index}", _row_of(value, dict(zip(others, fields, strict=True)))) for index, (value, *fields) in values
    )
    return _collected(rows, effort, f"dataset {name} ({split}, {column})")


def _row_of(value: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """Returns a row in the shape of JSONL. Null values are removed: tables give every object the keys of all rows."""
    kind = "prompt" if isinstance(value, str) else "messages"
    return {kind: _without_nulls(value)} | {key: _without_nulls(field) for key, field in fields.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _loaded(name: str, split: str, subset: str | None, revision: str | None) -> Any:
    import datasets  # imported late: it takes a second and most runs do without it

    path = Path(name)
    try:
        if path.is_file():
            if path.suffix not in FILE_FORMATS:
                raise PipelineError(f"{path} ends in {path.suffix!r}; wanted one of {', '.join(FILE_FORMATS)}")
            return datasets.load_dataset(FILE_FORMATS[path.suffix], data_files=str(path), split=split)
        if any((path / file).is_file() for file in SAVED):
            return _saved(datasets.load_from_disk(name), split)
        return datasets.load_dataset(name, subset, split=split, revision=revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise PipelineError(
            f"cannot load dataset {name}, split {split} ({type(error).__name__}: {error}); check the "
            "name, the split and the network, or give a local directory or file"
        ) from error


def _saved(loaded: Any, split: str) -> Any:
    """Returns the split of what `save_to_disk` wrote, which may be a single split without a name."""
    if not isinstance(loaded, dict):
        return loaded
    if split not in loaded:
        raise ValueError(f"it has the splits {', '.join(loaded)}")
    return loaded[split]


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return error


def _collected(rows: Iterator[tuple[str, Any]], effort: str | EffortMix, source: str) -> PromptSet:
    found: dict[str, Prompt] = {}
    num_rows, bad = 0, []
    for where, row in rows:
        num_rows += 1
        problem = _row_problem(row)
        if problem is not None:
            bad.append(f"{where}: {problem}")
            continue
        prompt = _prompt_of_row(row, effort)
        found.setdefault(_without_spaces(prompt), prompt)
    if bad:
        more = [f"and {len(bad) - SHOWN_ROWS} more"] if len(bad) > SHOWN_ROWS else []
        listed = "\n  ".join(bad[:SHOWN_ROWS] + more)
        raise PipelineError(f"{source} has {len(bad)} bad rows of {num_rows}; mend or delete them:\n  {listed}")
    if not found:
        raise PipelineError(f'{source} holds no prompt; wanted at least one row such as {{"prompt": "Hi"}}')
    return PromptSet(tuple(found.values()), num_rows - len(found))


def _without_spaces(prompt: Prompt) -> str:
    """Returns a key that is equal for prompts that differ in white space alone."""
    texts = [[message.role, message.content.split(), message.thinking] for message in prompt.messages]
    calls = [[call.as_dict() for call in message.tool_calls] for message in prompt.messages]
    return fingerprint_of([texts, calls, [tool.as_dict() for tool in prompt.tools]])


def _row_problem(row: Any) -> str | None:
    if isinstance(row, json.JSONDecodeError):
        return f"is not JSON ({row.msg} at column {row.colno}); wanted one object a line"
    if not isinstance(row, dict):
        return f"is a {type(row).__name__}; wanted an object with prompt or messages"
    try:
        json.dumps(row, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        return f"is not valid Unicode ({error}); wanted text that UTF-8 can write"
    if ("prompt" in row) == ("messages" in row):
        fields = ", ".join(map(str, row)) or "none"
        return f"has the fields {fields}; wanted exactly one of prompt and messages"
    if "prompt" in row and not (isinstance(row["prompt"], str) and row["prompt"].strip()):
        return f"has prompt {row['prompt']!r}; wanted a non-empty string"
    efforts = [row[key] for key in ("effort", "reasoning_effort") if row.get(key) is not None]
    if len(efforts) == 2 and efforts[0] != efforts[1]:
        return f"has effort {efforts[0]!r} and reasoning_effort {efforts[1]!r}; wanted one of them"
    problem = effort_problem(efforts[0]) if efforts else None
    problem = problem or (messages_problem(row["messages"]) if "messages" in row else None)
    return problem or tools_problem(_tools_in(row))


def _prompt_of_row(row: dict[str, Any], effort: str | EffortMix) -> Prompt:
    messages = row["messages"] if "messages" in row else [{"role": "user", "content": row["prompt"]}]
    row_effort = row.get("effort") or row.get("reasoning_effort")
    return prompt_of(map(message_of, messages), row_effort or effort, tools_of(_tools_in(row)))


def _tools_in(row: dict[str, Any]) -> Any:
    """Returns a row's tools, parsed when they are JSON; a text that is no JSON is returned unchanged."""
    tools = row.get("tools")
    if not isinstance(tools, str):
        return [] if tools is None else tools
    try:
        return json.loads(tools)
    except json.JSONDecodeError:
        return tools


def _check_effort(effort: str | EffortMix) -> None:
    problem = effort_problem(effort) if isinstance(effort, str) else None
    if problem is not None:
        raise PipelineError(problem)
