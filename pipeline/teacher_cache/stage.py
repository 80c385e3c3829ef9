"""`stage=teacher_cache`: stores the target's answers to prompts, and the features of its tapped layers."""

import dataclasses
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.artifacts import artifact
from pipeline.artifacts.files import disk_errors
from pipeline.artifacts.storage import StoragePath
from pipeline.config.fields import TEACHER_CACHE
from pipeline.config.schema import PipelineConfig
from pipeline.engine.request import Completion
from pipeline.errors import PipelineError
from pipeline.progress import Progress
from pipeline.teacher_cache import completion, forecast, shards
from pipeline.teacher_cache.job import CacheJob, job_of, outside_answers, rendered_prompts, teacher_of
from pipeline.teacher_cache.shards import ShardPlan, Teacher
from pipeline.teacher_cache.summary import PROMPTS, SUMMARY, answered, unused_of
from pipeline.tracking.run import Run
from pipeline.workspace.workspace import Workspace, command

log = logging.getLogger("pipeline")


def run(config: PipelineConfig, tracker: Run) -> None:
    """Makes the teacher cache of this configuration, or this writer's share of it, or reports that it is there."""
    workspace = Workspace(config)
    path = workspace.address(TEACHER_CACHE)
    if not artifact.exists(path):
        job = job_of(workspace)
        with disk_errors(path if isinstance(path, Path) else job.staging), artifact.exclusive(path, job.writer.part):
            if not artifact.exists(path):
                _make(job, tracker)
                return
    _reuse(workspace, tracker)


def _make(job: CacheJob, tracker: Run) -> None:
    mine, others = job.writer.share(job.plans)
    reports = shards.reports_of_complete(mine)
    complete = reports | shards.reports_of_complete(others, verify=False)
    missing = [plan for plan in job.plans if plan.path not in complete]
    max_new_tokens = job.workspace.config.teacher_cache.max_new_tokens
    forecast.require_space(job.path, job.staging, missing, job.layout, max_new_tokens)

    missing_here = [plan for plan in mine if plan.path not in reports]
    reply_log = job.staging.with_suffix(".answers.jsonl")
    answers = outside_answers(job, missing_here, reply_log)
    teacher = dataclasses.replace(teacher_of(job.workspace), outside_answers=answers)
    forecast.log_time(teacher, [row for plan in missing_here for row in plan.rows])
    job.writer.clear(job.path, mine, reports)
    tokens_per_second = _make_shards(job, mine, reports, teacher)
    reply_log.unlink(missing_ok=True)
    with job.writer.alone(job.path):
        complete = reports | shards.reports_of_complete(others, verify=False)
        if artifact.exists(job.path):
            log.info("teacher_cache: another writer has completed it")
            _reuse(job.workspace, tracker)
        elif len(complete) < len(job.plans):
            job.writer.log_missing(job.plans, complete)
        else:
            completion.complete(job, complete, teacher, tracker)
            job.writer.remove_locks(job.path)
    tracker.log_metrics({"teacher_cache/tokens_per_second": tokens_per_second})


def _make_shards(job: CacheJob, plans: Sequence[ShardPlan], reports: dict[StoragePath, Any], teacher: Teacher) -> float:
    """Makes the shards that are missing, adding their reports; returns the tokens generated a second."""
    total = sum(len(plan.rows) for plan in plans)
    done = sum(report["num_sequences"] + len(report.get("failed", ())) for report in reports.values())
    if done:
        log.info("teacher_cache: going on; %d of %d shards are complete", len(reports), len(plans))
    started, num_new = time.monotonic(), 0
    with Progress("teacher_cache", total, "sequences", done=done) as progress:

        def count(completion: Completion) -> None:
            nonlocal num_new
            num_new += len(completion.token_ids)
            progress.advance(1, f"{num_new / (time.monotonic() - started):.0f} tokens/s")

        missing = [plan for plan in plans if plan.path not in reports]
        for index, plan in enumerate(missing):
            report = reports[plan.path] = shards.make_shard(plan, teacher, job.layout, count, job.staging)
            progress.advance(len(report.get("failed", ())))
            if index == 0 and len(missing) > 1:
                forecast.log_rest(time.monotonic() - started, plan, missing[1:], report)
    return num_new / (time.monotonic() - started) if num_new else 0.0


def _reuse(workspace: Workspace, tracker: Run) -> None:
    cache, wanted = workspace.open(TEACHER_CACHE), workspace.settings(TEACHER_CACHE)
    shared = cache.settings.keys() & wanted.keys() if cache.key is None else cache.settings.keys() | wanted.keys()
    names = sorted(name for name in shared if cache.settings.get(name) != wanted.get(name))
    if names:  # possible only at a path that the user set
        listed = "\n  ".join(f"{name}: found {cache.settings.get(name)}, wanted {wanted.get(name)}" for name in names)
        raise PipelineError(
            f"teacher_cache.path {cache.path} holds a cache made with other settings; give another path or these "
            f"settings\n  {listed}"
        )
    artifact.require_intact(cache, (SUMMARY,), make_with=command("teacher_cache"), memory=workspace.memory)
    if workspace.config.teacher_cache.verify:
        artifact.require_intact(cache, (PROMPTS,), make_with=command("teacher_cache"), memory=workspace.memory)
        rows_read = answered(rendered_prompts(workspace)["train"], unused_of(cache.path))
        verified = completion.verify_share(workspace, cache.path, rows_read, teacher_of(workspace))
        completion.log_verified(tracker, verified)
    summary = json.loads((cache.path / SUMMARY).read_text())
    completion.log_summary(tracker, summary, cache.contract, cache.path)
    log.info("teacher_cache: complete, nothing to do (%d tokens): %s", summary["num_tokens"], cache.path)
