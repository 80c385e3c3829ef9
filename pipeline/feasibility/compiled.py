"""The times of steps as the compiler of a TPU slice estimates them, from a report of `stage=compile`."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.feasibility.step_times import StepTimes

ROUND = re.compile(r"dflash (\d+)$")


def from_report(path: Path, *, concurrency: int) -> list[StepTimes]:
    """Returns the times of each block size in a report; raises PipelineError where it has no estimates.

    A program's time is the compiler's estimate, or the least time where it gives none.
    """
    programs = {one["name"]: _seconds(one) for one in json.loads(path.read_text())["programs"]}
    plain = programs.get("decode")
    rounds = {int(name.split()[1]): seconds for name, seconds in programs.items() if ROUND.match(name)}
    if plain is None or not rounds or None in rounds.values():
        raise PipelineError(
            f"{path} has no times of a plain step and of rounds: run stage=compile again, without errors"
        )
    times = []
    for size, seconds in sorted(rounds.items()):
        drafted = programs.get(f"draft {size}") or 0.0
        verify = (seconds or 0.0) - drafted
        times.append(StepTimes(concurrency=concurrency, block_size=size, plain=plain, draft=drafted, verify=verify))
    return times


def _seconds(program: Mapping[str, Any]) -> float | None:
    costs = program["costs"]
    if costs is None:
        return None
    return max(costs["seconds"] or 0.0, costs["floor_seconds"])
