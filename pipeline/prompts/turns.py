"""Brings the turns of a conversation into the order that Harmony has: instructions first, one call a turn."""

from collections.abc import Sequence
from typing import Any

from pipeline.errors import PipelineError
from pipeline.prompts.messages import INSTRUCTION_ROLES
from pipeline.prompts.tools import shown

SEPARATOR = "\n\n"  # between instructions that are joined


def join_instructions(turns: Sequence[dict[str, Any]], before: Any = None) -> list[dict[str, Any]]:
    """Returns the turns with all instructions at their beginning in one message, and without empty ones.

    `before` is an instruction in front of them. Raises PipelineError for instructions that are no texts.
    """
    num_first = next((index for index, turn in enumerate(turns) if turn["role"] not in INSTRUCTION_ROLES), len(turns))
    texts = [before, *(turn["content"] for turn in turns[:num_first])]
    wrong = next((text for text in texts if not isinstance(text, str | None)), None)
    if wrong is not None:
        raise PipelineError(f"has instructions {shown(wrong)}")
    instructions = list(dict.fromkeys(text for text in texts if text and text.strip()))
    if not instructions:
        return list(turns[num_first:])
    role = turns[0]["role"] if num_first else "system"
    return [{"role": role, "content": SEPARATOR.join(instructions)}, *turns[num_first:]]


def separate_calls(turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the turns with parallel calls one after the other, each before its result.

    Raises PipelineError when a call has no result.
    """
    found, rest = [], list(turns)
    while rest:
        turn = rest.pop(0)
        calls = turn.get("tool_calls")
        if not isinstance(calls, list) or len(calls) < 2:
            found.append(turn)
            continue
        results, rest = rest[: len(calls)], rest[len(calls) :]
        if len(results) < len(calls) or any(result["role"] != "tool" for result in results):
            raise PipelineError(f"has {len(calls)} calls side by side, not all of which have a result")
        for call, result in zip(calls, _in_order(calls, results), strict=True):
            found += [turn | {"tool_calls": [call]}, result]
            turn = {"role": "assistant", "content": None}
    return found


def _in_order(calls: list[Any], results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the results in the order of their calls, by their ids where all have one."""
    ids = [call.get("id") if isinstance(call, dict) else None for call in calls]
    by_id = {result.get("tool_call_id"): result for result in results}
    return [by_id[name] for name in ids] if None not in ids and set(ids) == by_id.keys() else results
