"""What a teacher cache will take, told before it is begun: bytes, free space and time."""

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import artifacts
from pipeline.places import Place
from pipeline.teacher_cache import store
from pipeline.teacher_cache.generate import Rendered
from pipeline.teacher_cache.shards import Plan, Teacher
from pipeline.teacher_cache.store import Layout

log = logging.getLogger("pipeline")

MIB = 2**20
TRIAL_WORTH = 16  # batches of answers, from which on a trial is made first
TRIAL_TOKENS = (2, 18)  # of each answer: the time between is decoding's


def require_space(path: Place, staging: Path, missing: Sequence[Plan], layout: Layout, max_new_tokens: int) -> None:
    """Tell what the `missing` shards take at most, and refuse a disk that cannot hold it.

    A bucket needs room for one of them on this machine, in `staging`.
    """
    tokens = [sum(len(row.token_ids) + max_new_tokens for row in one.rows) for one in missing]
    sizes = [store.estimated_bytes(count, len(one.rows), 1, layout) for count, one in zip(tokens, missing, strict=True)]
    is_local = isinstance(path, Path)
    log.info(
        "teacher_cache: at most %d tokens of %d bytes (features: %s) in %d shards, %.1f MiB; %s",
        sum(tokens),
        layout.token_bytes,
        layout.stored,
        len(missing),
        sum(sizes) / MIB,
        f"{artifacts.free_bytes(path) / MIB:.0f} MiB are free" if is_local else "what a bucket can hold is not known",
    )
    if is_local:
        artifacts.require_free_space(path, sum(sizes), "the teacher cache")
    else:
        artifacts.require_free_space(staging, max(sizes, default=0), "a shard on its way to the bucket")


def tell_time(teacher: Teacher, rows: Sequence[Rendered]) -> None:
    """Say how long the answers to `rows` will take, by a trial that is not kept; of few answers it is not worth one."""
    if teacher.elsewhere is not None or len(rows) < TRIAL_WORTH * teacher.slots:
        log.info("teacher_cache: the time is told when the first shard is made")
        return
    prefill, decode = trial(teacher, rows)
    log.info(
        "teacher_cache: %d answers to go, tried with %d: %.1f ms of prefill each and %.0f tokens/s take at most about "
        "%.1f hours",
        len(rows),
        teacher.slots,
        1000 * prefill,
        1 / decode if decode else 0.0,
        len(rows) * (prefill + teacher.max_new_tokens * decode) / 3600,
    )


def trial(teacher: Teacher, rows: Sequence[Rendered]) -> tuple[float, float]:
    """Seconds of prefill for an answer and of decoding for a token, with all slots full; compiles what answers need."""

    def seconds(num_tokens: int) -> float:
        started = time.perf_counter()
        length = teacher.max_prompt_tokens + teacher.max_new_tokens  # the same cache, so the same programs
        short = dataclasses.replace(teacher, max_new_tokens=num_tokens, max_prompt_tokens=length - num_tokens)
        short.answer(rows[: teacher.slots], lambda _: None)
        return time.perf_counter() - started

    seconds(TRIAL_TOKENS[0])
    first, last = (seconds(num_tokens) for num_tokens in TRIAL_TOKENS)
    more = (TRIAL_TOKENS[1] - TRIAL_TOKENS[0]) * teacher.slots
    return first / teacher.slots, max(last - first, 0.0) / more


def tell_rest(seconds: float, first: Plan, rest: Sequence[Plan], report: Mapping[str, Any]) -> None:
    """Say what the rest will take, now that the first shard is made."""
    share = sum(len(one.rows) for one in rest) / len(first.rows)
    log.info(
        "teacher_cache: the first shard took %.0f s, compiling included; %d more take about %.1f hours and %.1f MiB",
        seconds,
        len(rest),
        seconds * share / 3600,
        report["bytes"] * share / MIB,
    )
