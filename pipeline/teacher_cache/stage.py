"""`stage=teacher_cache`: prompts -> the target's answers and the features of its tapped layers, on disk."""

import dataclasses
import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline import artifacts, lineage
from pipeline.artifacts import PipelineError
from pipeline.config import PipelineConfig, Precision
from pipeline.dflash.contract import Contract
from pipeline.machine import machine, read_target
from pipeline.model.draft import DraftConfig
from pipeline.progress import Progress
from pipeline.prompts.chat_format import stop_token_ids
from pipeline.prompts.split import split_by_hash
from pipeline.prompts.tokenizer import load_tokenizer
from pipeline.serve.engine import Finished
from pipeline.teacher_cache import shards, store
from pipeline.teacher_cache.check import Checked, check
from pipeline.teacher_cache.generate import Rendered, render
from pipeline.teacher_cache.shards import Plan, Teacher
from pipeline.tracking import Run

log = logging.getLogger("pipeline")

SUMMARY, PROMPTS = "summary.json", "prompts.jsonl"
MIB = 2**20


def run(config: PipelineConfig, tracker: Run) -> None:
    """Make the teacher cache of this configuration, or say that it is there."""
    target = lineage.target(config)
    path = lineage.teacher_cache_address(config, target)
    settings = lineage.teacher_cache_settings(config, target)
    if artifacts.exists(path):
        _reuse(config, target, settings, tracker)
        return
    draft = lineage.draft_config(config, target)
    _require_positions(config, draft)
    tokenizer = load_tokenizer(target.path)
    rows, num_duplicates = _rendered(config, tokenizer)
    scratch = artifacts.scratch_of(path)
    plans = shards.plan(scratch, rows, config.teacher_cache.shard_sequences, settings)
    reports = shards.reports_of_complete(plans)
    _require_space(path, plans, reports, draft.feature_size, config.teacher_cache.max_new_tokens)
    teacher = _teacher(config, target.path, draft, tokenizer)

    with artifacts.disk_errors(path):
        artifacts.open_scratch(path, resume=True)
        shards.clear_except(scratch, reports)
        seconds, num_new = _make_shards(plans, reports, teacher)
        num_shards = {split: sum(one.split == split for one in plans) for split in store.SPLITS}
        store.write_header(scratch, draft.feature_size, num_shards)
        checked = _check(config, scratch, rows["heldout"], teacher, draft)
        summary = _summary(rows, num_duplicates, plans, reports, draft)
        artifacts.write_bytes(scratch / PROMPTS, _prompt_lines(rows))
        artifacts.write_json(scratch / SUMMARY, summary)
        provenance = artifacts.provenance("teacher_cache", settings, {"target": target.fingerprint})
        contract = _contract(lineage.cache_contract(config, target, provenance), rows).to_json()
        made = artifacts.seal(path, kind=lineage.TEACHER_CACHE, settings=settings, contract=contract)
    _log_summary(tracker, summary, contract)
    tracker.log_metrics(
        {
            "teacher_cache/tokens_per_second": num_new / seconds if seconds else 0.0,
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
        draft.block_size,
        checked.random.accept_length,
        made.path,
    )


def _reuse(config: PipelineConfig, target: lineage.Target, settings: dict[str, Any], tracker: Run) -> None:
    made = lineage.teacher_cache(config, target)
    keys = sorted(key for key in made.settings.keys() | settings if made.settings.get(key) != settings.get(key))
    if keys:  # only at a path that was given by hand
        listed = "\n  ".join(f"{key}: found {made.settings.get(key)}, wanted {settings.get(key)}" for key in keys)
        raise PipelineError(
            f"teacher_cache.path {made.path} holds a cache made with other settings; give another path or these "
            f"settings\n  {listed}"
        )
    summary = json.loads((made.path / SUMMARY).read_text())
    _log_summary(tracker, summary, made.contract)
    log.info("teacher_cache: complete, nothing to do (%d tokens): %s", summary["num_tokens"], made.path)


def _require_positions(config: PipelineConfig, draft: DraftConfig) -> None:
    wanted = config.teacher_cache.max_prompt_tokens + config.teacher_cache.max_new_tokens
    if wanted > draft.max_position_embeddings:
        raise PipelineError(
            f"teacher_cache.max_prompt_tokens + teacher_cache.max_new_tokens is {wanted}; the target has "
            f"{draft.max_position_embeddings} positions: lower either"
        )


def _rendered(config: PipelineConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, list[Rendered]], int]:
    found = lineage.prompt_set(config)
    sides = split_by_hash(found.prompts, config.prompts.heldout_fraction)
    longest = config.teacher_cache.max_prompt_tokens
    rows = {
        split: render(tokenizer, prompts, longest, split, date=config.prompts.date)
        for split, prompts in zip(store.SPLITS, sides, strict=True)
    }
    skipped = [row for split in rows.values() for row in split if row.skipped]
    used = {split: sum(row.skipped is None for row in several) for split, several in rows.items()}
    log.info(
        "teacher_cache: %d prompts = %d train + %d held out + %d skipped (and %d repeated)",
        len(found.prompts),
        used["train"],
        used["heldout"],
        len(skipped),
        found.num_duplicates,
    )
    if skipped:
        first = skipped[0]
        log.warning(
            "teacher_cache: %d prompts are skipped, all of them listed in %s; the first, %s: %s",
            len(skipped),
            PROMPTS,
            first.prompt.prompt_id[:12],
            first.skipped,
        )
    return rows, found.num_duplicates


def _require_space(
    path: Path, plans: Sequence[Plan], reports: Mapping[Path, Any], feature_size: int, max_new_tokens: int
) -> None:
    missing = [one for one in plans if one.path not in reports]
    rows = [row for one in missing for row in one.rows]
    num_tokens = sum(len(row.token_ids) + max_new_tokens for row in rows)
    needed = store.estimated_bytes(num_tokens, len(rows), len(missing), feature_size)
    log.info(
        "teacher_cache: at most %d tokens of %d bytes, %.1f MiB; %.0f MiB are free",
        num_tokens,
        4 + 2 * feature_size,
        needed / MIB,
        artifacts.free_bytes(path) / MIB,
    )
    artifacts.require_free_space(path, needed, "the teacher cache")


def _teacher(
    config: PipelineConfig, directory: Path, draft: DraftConfig, tokenizer: PreTrainedTokenizerBase
) -> Teacher:
    here = machine(config.mesh, directory)
    model, weights = read_target(config, directory, here)
    return Teacher(
        weights=weights,
        config=model,
        tapped_layers=draft.tapped_layers,
        stop_token_ids=tuple(stop_token_ids(tokenizer)),
        slots=config.teacher_cache.batch_size,
        max_prompt_tokens=config.teacher_cache.max_prompt_tokens,
        max_new_tokens=config.teacher_cache.max_new_tokens,
        here=here,
    )


def _make_shards(plans: Sequence[Plan], reports: dict[Path, Any], teacher: Teacher) -> tuple[float, int]:
    """Make the shards that are missing, adding their reports; returns seconds and tokens generated."""
    total = sum(len(one.rows) for one in plans)
    done = sum(report["num_sequences"] for report in reports.values())
    if done:
        log.info("teacher_cache: going on; %d of %d shards are complete", len(reports), len(plans))
    started, num_new = time.monotonic(), 0
    with Progress("teacher_cache", total, "sequences", done=done) as progress:

        def count(one: Finished) -> None:
            nonlocal num_new
            num_new += len(one.token_ids)
            progress.advance(1, f"{num_new / (time.monotonic() - started):.0f} tokens/s")

        for one in plans:
            if one.path not in reports:
                reports[one.path] = shards.make(one, teacher, count)
    return time.monotonic() - started, num_new


def _check(
    config: PipelineConfig, scratch: Path, rows: Sequence[Rendered], teacher: Teacher, draft: DraftConfig
) -> Checked:
    return check(
        store.open_split(scratch, "heldout"),
        [row.token_ids for row in rows if row.skipped is None],
        teacher.capture,
        block_size=draft.block_size,
        vocab_size=draft.vocab_size,
        tie_gap=shards.TIE_GAP[config.target.precision.value],
        is_exact=config.target.precision is Precision.float32,
        seed=config.seed,
    )


def _contract(wanted: Contract, rows: Mapping[str, Sequence[Rendered]]) -> Contract:
    """The contract with the efforts that were rendered: a row of a JSONL file may bring its own."""
    efforts = {row.prompt.effort for several in rows.values() for row in several if row.skipped is None}
    return dataclasses.replace(wanted, text=dataclasses.replace(wanted.text, reasoning_efforts=sorted(efforts)))


def _summary(
    rows: Mapping[str, Sequence[Rendered]],
    num_duplicates: int,
    plans: Sequence[Plan],
    reports: Mapping[Path, dict[str, Any]],
    draft: DraftConfig,
) -> dict[str, Any]:
    """Every prompt accounted for, and what was made of them; no times, so that equal runs have equal bytes."""
    splits = {}
    for split, several in rows.items():
        made = [reports[one.path] for one in plans if one.split == split]
        gaps = [item["gap"] for report in made for item in report["disagreements"]]
        splits[split] = {
            "num_prompts": len(several),
            "num_skipped": sum(row.skipped is not None for row in several),
            "num_disagreements": len(gaps),
            "largest_gap": max(gaps, default=0.0),
            **{
                key: sum(report[key] for report in made)
                for key in ("num_sequences", "num_tokens", "num_generated_tokens", "num_stopped")
            },
        }
    return {
        "splits": splits,
        "num_duplicates": num_duplicates,
        "num_sequences": sum(split["num_sequences"] for split in splits.values()),
        "num_tokens": sum(split["num_tokens"] for split in splits.values()),
        "num_skipped": sum(split["num_skipped"] for split in splits.values()),
        "bytes": sum(file.stat().st_size for one in plans for file in one.path.rglob("*") if file.is_file()),
        "feature_size": draft.feature_size,
        "tapped_layers": list(draft.tapped_layers),
    }


def _prompt_lines(rows: Mapping[str, Sequence[Rendered]]) -> bytes:
    lines = [
        {
            "prompt_id": row.prompt.prompt_id,
            "split": split,
            "effort": row.prompt.effort,
            "messages": [message.as_dict() for message in row.prompt.messages],
            **({"tools": [tool.as_dict() for tool in row.prompt.tools]} if row.prompt.tools else {}),
            "num_tokens": len(row.token_ids),
            "skipped": row.skipped,
        }
        for split, several in rows.items()
        for row in several
    ]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()


def _log_summary(tracker: Run, summary: Mapping[str, Any], contract: Mapping[str, Any]) -> None:
    tracker.log_json(SUMMARY, summary)
    tracker.log_json(artifacts.CONTRACT, contract)
    tracker.log_metrics(
        {
            "teacher_cache/num_sequences": summary["num_sequences"],
            "teacher_cache/num_tokens": summary["num_tokens"],
            "teacher_cache/bytes": summary["bytes"],
            "teacher_cache/skipped": summary["num_skipped"],
        }
    )
