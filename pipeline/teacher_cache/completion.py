"""Completes a teacher cache whose shards all exist: checks it, summarises it and seals it."""

import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.artifacts import artifact
from pipeline.artifacts.artifact import Artifact
from pipeline.artifacts.contract import Contract
from pipeline.artifacts.files import write_bytes, write_json
from pipeline.artifacts.hashing import fingerprint_of
from pipeline.artifacts.storage import StoragePath
from pipeline.engine.ties import TIE_GAP
from pipeline.errors import PipelineError
from pipeline.progress import MIB
from pipeline.prompts.channels import channel_tokens, channels
from pipeline.store.layout import HEADER, SPLITS, listed_files
from pipeline.store.reader import CacheSplit, open_split
from pipeline.store.writer import write_header
from pipeline.teacher_cache import shards
from pipeline.teacher_cache.check import CacheCheck, check_cache
from pipeline.teacher_cache.job import CacheJob
from pipeline.teacher_cache.render import RenderedPrompt
from pipeline.teacher_cache.shards import Teacher
from pipeline.teacher_cache.summary import PROMPTS, SUMMARY, answered, failures, prompt_lines, summarise
from pipeline.teacher_cache.verify import CacheVerification, sample_indices, verify_cache
from pipeline.tracking.run import Run
from pipeline.workspace.workspace import TARGET, TEACHER_CACHE, Workspace

log = logging.getLogger("pipeline")


def complete(job: CacheJob, reports: Mapping[StoragePath, dict[str, Any]], teacher: Teacher, tracker: Run) -> None:
    """Checks the cache, writes its summary, seals it, and logs all three."""
    workspace, root, rows = job.workspace, job.root, job.rows
    beside = (HEADER, SUMMARY, PROMPTS, artifact.CONTRACT, artifact.MANIFEST)
    # in a bucket another writer may be completing the cache too: files that both write are not removed
    shards.clear_except(root, {*reports, *(root / name for name in beside)})
    num_shards = {split: sum(plan.split == split for plan in job.plans) for split in SPLITS}
    write_header(root, job.layout, num_shards)
    failed = failures(reports)
    checked = _check(job, answered(rows["heldout"], failed), teacher)
    verified = verify_share(workspace, root, answered(rows["train"], failed), teacher)
    tapped = job.draft.tapped_layers
    summary = summarise(rows, workspace.prompts, job.plans, reports, tapped_layers=tapped, layout=job.layout)
    write_bytes(root / PROMPTS, prompt_lines(rows, failed))
    write_json(root / SUMMARY, summary)
    provenance = workspace.provenance(TEACHER_CACHE, {TARGET: workspace.target.fingerprint})
    sealed = workspace.seal(
        TEACHER_CACHE,
        _contract(workspace.contract(TEACHER_CACHE, provenance), rows),
        {TARGET: workspace.target},
        listed=[*listed_files(num_shards), PROMPTS, SUMMARY],
    )
    log_summary(tracker, summary, sealed.contract, sealed.path)
    _log_checked(tracker, checked, summary, sealed)
    log_verified(tracker, verified)


def verify_share(
    workspace: Workspace, root: StoragePath, rows: Sequence[RenderedPrompt], teacher: Teacher
) -> CacheVerification | None:
    """Verifies a share of the train sequences with the target; returns None unless `teacher_cache.verify` asks for it.

    Raises PipelineError when what the target computes differs from what is stored.
    """
    config = workspace.config
    if not config.teacher_cache.verify:
        return None
    split = open_split(root, "train")
    _require_prompts(split, rows, root)
    return verify_cache(
        split,
        sample_indices(split.num_sequences, config.teacher_cache.verify, config.seed),
        [row.token_ids for row in rows],
        teacher.capture,
        functools.partial(channels, channel_tokens(workspace.tokenizer)),
        tie_gap=TIE_GAP[teacher.precision] if teacher.origin.is_engine else None,
        is_exact=teacher.precision == "float32",
    )


def _require_prompts(split: CacheSplit, rows: Sequence[RenderedPrompt], root: StoragePath) -> None:
    """Raises PipelineError unless the sequences of a split are those of these prompts, in their order."""
    wanted = [row.prompt.prompt_id for row in rows]
    if split.prompt_ids == wanted:
        return
    stored, rendered = set(split.prompt_ids), set(wanted)
    raise PipelineError(
        f"{root} cannot be verified: {len(stored - rendered)} of its {len(stored)} train sequences are of prompts that "
        f"this program does not render, {len(rendered - stored)} rendered prompts have no sequence, and {PROMPTS} has "
        "no reason for either; delete the cache and make it again"
    )


def log_verified(tracker: Run, verified: CacheVerification | None) -> None:
    """Logs the result of a verification, if there was one."""
    if verified is None:
        return
    tracker.log_metrics(
        {
            "teacher_cache/verified_sequences": verified.num_sequences,
            "teacher_cache/verified_worst_difference": verified.worst_difference,
        }
    )
    log.info(
        "teacher_cache: %d train sequences (%d tokens) read again by the target: as stored; features differ by %.2g at "
        "most",
        verified.num_sequences,
        verified.num_tokens,
        verified.worst_difference,
    )


def log_summary(tracker: Run, summary: Mapping[str, Any], contract: Mapping[str, Any], source: StoragePath) -> None:
    """Logs what a cache holds."""
    made_of = {"sequences": summary["num_sequences"], "tokens": summary["num_tokens"]}
    digest = fingerprint_of(summary["splits"])
    tracker.log_dataset("prompts and answers", digest, source=str(source), context="training", profile=made_of)
    tracker.log_json(SUMMARY, summary)
    tracker.log_json(artifact.CONTRACT, contract)
    tracker.log_metrics(
        {
            "teacher_cache/num_sequences": summary["num_sequences"],
            "teacher_cache/num_tokens": summary["num_tokens"],
            "teacher_cache/bytes": summary["bytes"],
            "teacher_cache/skipped": summary["num_skipped"],
            "teacher_cache/failed": summary["num_failed"],
        }
    )


def _check(job: CacheJob, rows: Sequence[RenderedPrompt], teacher: Teacher) -> CacheCheck:
    return check_cache(
        open_split(job.root, "heldout"),
        [row.token_ids for row in rows],
        teacher.capture,
        draft=job.draft,
        tie_gap=TIE_GAP[teacher.precision],
        is_exact=teacher.precision == "float32",
        seed=job.workspace.config.seed,
        origin=teacher.origin,
    )


def _contract(wanted: Contract, rows: Mapping[str, Sequence[RenderedPrompt]]) -> Contract:
    """Returns the contract with the efforts that were rendered: a row of a JSONL file may set its own."""
    efforts = {row.prompt.effort for split_rows in rows.values() for row in split_rows if row.skipped is None}
    return dataclasses.replace(wanted, text=dataclasses.replace(wanted.text, reasoning_efforts=sorted(efforts)))


def _log_checked(tracker: Run, checked: CacheCheck, summary: Mapping[str, Any], sealed: Artifact) -> None:
    tracker.log_metrics(
        {
            "teacher_cache/gold_accept_length": checked.gold.accept_length,
            "teacher_cache/random_accept_length": checked.random.accept_length,
        }
    )
    log.info(
        "teacher_cache: %d sequences, %d tokens, %.1f MiB; gold draft %.3f of %d, random %.3f: %s",
        summary["num_sequences"],
        summary["num_tokens"],
        summary["bytes"] / MIB,
        checked.gold.accept_length,
        checked.gold.block_size,
        checked.random.accept_length,
        sealed.path,
    )
