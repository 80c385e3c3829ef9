"""Estimates what a teacher cache will take (bytes, free space and time) and logs it before work begins."""

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.artifacts.files import free_bytes, require_free_space
from pipeline.artifacts.storage import StoragePath
from pipeline.progress import MIB
from pipeline.store.layout import CacheLayout, estimated_bytes
from pipeline.teacher_cache.render import RenderedPrompt
from pipeline.teacher_cache.shards import ShardPlan, Teacher

log = logging.getLogger("pipeline")

TRIAL_WORTH = 16  # full batches of answers; for fewer no trial is run
TRIAL_TOKENS = (2, 18)  # per answer: the difference in time is decoding alone


def require_space(
    path: StoragePath, staging: Path, missing: Sequence[ShardPlan], layout: CacheLayout, max_new_tokens: int
) -> None:
    """Logs what the `missing` shards take at most; raises PipelineError for a disk that cannot hold them.

    A bucket needs room for one shard on this machine, in `staging`.
    """
    tokens = [sum(len(row.token_ids) + max_new_tokens for row in plan.rows) for plan in missing]
    sizes = [estimated_bytes(count, len(plan.rows), 1, layout) for count, plan in zip(tokens, missing, strict=True)]
    free = (
        f"{free_bytes(path) / MIB:.0f} MiB are free"
        if isinstance(path, Path)
        else "what a bucket can hold is not known"
    )
    log.info(
        "teacher_cache: at most %d tokens of %d bytes (features: %s) in %d shards, %.1f MiB; %s",
        sum(tokens),
        layout.token_bytes,
        layout.stored,
        len(missing),
        sum(sizes) / MIB,
        free,
    )
    if isinstance(path, Path):
        require_free_space(path, sum(sizes), "the teacher cache")
    else:
        require_free_space(staging, max(sizes, default=0), "a shard on its way to the bucket")


def log_time(teacher: Teacher, rows: Sequence[RenderedPrompt]) -> None:
    """Logs how long the answers to `rows` will take; runs a trial when there are enough answers to be worth it."""
    if teacher.outside_answers is not None or len(rows) < TRIAL_WORTH * teacher.engine.num_slots:
        log.info("teacher_cache: the time is known when the first shard is made")
        return
    prefill, decode = trial(teacher, rows)
    log.info(
        "teacher_cache: %d answers to go, tried with %d: %.1f ms of prefill each and %.0f tokens/s take at most about "
        "%.1f hours",
        len(rows),
        teacher.engine.num_slots,
        1000 * prefill,
        1 / decode if decode else 0.0,
        len(rows) * (prefill + teacher.max_new_tokens * decode) / 3600,
    )


def trial(teacher: Teacher, rows: Sequence[RenderedPrompt]) -> tuple[float, float]:
    """Returns the seconds of prefill per answer and of decoding per token, with all slots full."""

    def seconds(num_tokens: int) -> float:
        started = time.perf_counter()
        short = dataclasses.replace(teacher, max_new_tokens=num_tokens)  # the same engine, so the same programs
        short.answer(rows[: teacher.engine.num_slots], lambda _: None)
        return time.perf_counter() - started

    seconds(TRIAL_TOKENS[0])
    first, last = (seconds(num_tokens) for num_tokens in TRIAL_TOKENS)
    more = (TRIAL_TOKENS[1] - TRIAL_TOKENS[0]) * teacher.engine.num_slots
    return first / teacher.engine.num_slots, max(last - first, 0.0) / more


def log_rest(seconds: float, first: ShardPlan, rest: Sequence[ShardPlan], report: Mapping[str, Any]) -> None:
    """Logs what the other shards will take, estimated from the first."""
    share = sum(len(plan.rows) for plan in rest) / len(first.rows)
    log.info(
        "teacher_cache: the first shard took %.0f s, compiling included; %d more take about %.1f hours and %.1f MiB",
        seconds,
        len(rest),
        seconds * share / 3600,
        report["bytes"] * share / MIB,
    )
