"""`stage=teacher_cache`: prompts -> the target's answers and the features of its tapped layers, on disk."""

import contextlib
import dataclasses
import fcntl
import functools
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline import artifacts, lineage, places
from pipeline.artifacts import PipelineError
from pipeline.config import FeatureStore, Generator, PipelineConfig, Precision
from pipeline.dflash.contract import Contract
from pipeline.machine import machine, read_target
from pipeline.model.draft import DraftConfig
from pipeline.model.sampling import Sampling
from pipeline.places import Place
from pipeline.progress import Progress
from pipeline.prompts.channels import Channel, channel_tokens, channels
from pipeline.prompts.chat_format import chat_format_of, stop_token_ids
from pipeline.prompts.sources import PromptSet
from pipeline.prompts.split import split_by_hash
from pipeline.prompts.tokenizer import load_tokenizer
from pipeline.serve.engine import Finished
from pipeline.teacher_cache import shards, store
from pipeline.teacher_cache.check import Checked, check
from pipeline.teacher_cache.generate import Rendered, render
from pipeline.teacher_cache.origin import Divergence, Origin
from pipeline.teacher_cache.shards import Plan, Teacher
from pipeline.teacher_cache.store import Layout
from pipeline.teacher_cache.verify import Verified, sample, verify
from pipeline.tracking import Run

log = logging.getLogger("pipeline")

SUMMARY, PROMPTS = "summary.json", "prompts.jsonl"
MIB = 2**20


def run(config: PipelineConfig, tracker: Run) -> None:
    """Make the teacher cache of this configuration, or this writer's share of it, or say that it is there."""
    target = lineage.target(config)
    path = lineage.teacher_cache_address(config, target)
    settings = lineage.teacher_cache_settings(config, target)
    if artifacts.exists(path):
        _reuse(config, target, settings, tracker)
        return
    draft = lineage.draft_config(config, target)
    _require_positions(config, draft)
    tokenizer = load_tokenizer(target.path)
    rows, found = _rendered(config, tokenizer)
    layout = _layout(config, draft)
    root, staging = artifacts.scratch_of(path), _staging(config, settings)
    local = path if isinstance(path, Path) else staging
    plans = shards.plan(root, rows, config.teacher_cache.shard_sequences, settings)
    mine = plans[config.teacher_cache.writer :: config.teacher_cache.num_writers]
    reports = shards.reports_of_complete(mine)
    _require_space(config, path, staging, plans, reports, layout)

    with artifacts.disk_errors(local):
        journal = staging.with_suffix(".answers.jsonl")
        elsewhere = _asked(config, [one for one in mine if one.path not in reports], tokenizer, journal)
        teacher = dataclasses.replace(_teacher(config, target.path, draft, tokenizer), elsewhere=elsewhere)
        _clear(config, path, mine, reports)
        seconds, num_new = _make_shards(mine, reports, teacher, layout, staging)
        journal.unlink(missing_ok=True)
        reports |= shards.reports_of_complete([one for one in plans if one not in mine], verify=False)
        with _alone(config, path):
            if artifacts.exists(path):
                log.info("teacher_cache: another writer has completed it")
                _reuse(config, target, settings, tracker)
                return
            if len(reports) < len(plans):
                _tell_missing(config, plans, reports)
                return
            shards.clear_except(root, reports)
            num_shards = {split: sum(one.split == split for one in plans) for split in store.SPLITS}
            store.write_header(root, layout, num_shards)
            failed = _failed(reports)
            checked = _check(config, root, _answered(rows["heldout"], failed), teacher, draft)
            verified = _verified(config, root, _answered(rows["train"], failed), teacher, tokenizer)
            summary = _summary(rows, found, plans, reports, draft, layout)
            artifacts.write_bytes(root / PROMPTS, _prompt_lines(rows, failed))
            artifacts.write_json(root / SUMMARY, summary)
            provenance = artifacts.provenance("teacher_cache", settings, {"target": target.fingerprint})
            contract = _contract(lineage.cache_contract(config, target, provenance), rows).to_json()
            listed = [*store.listed(num_shards), PROMPTS, SUMMARY]
            made = artifacts.seal(path, kind=lineage.TEACHER_CACHE, settings=settings, contract=contract, listed=listed)
    _log_summary(tracker, summary, contract)
    tracker.log_metrics(
        {
            "teacher_cache/tokens_per_second": num_new / seconds if seconds else 0.0,
            "teacher_cache/gold_accept_length": checked.gold.accept_length,
            "teacher_cache/random_accept_length": checked.random.accept_length,
        }
    )
    _log_verified(tracker, verified)
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


def _origin(config: PipelineConfig) -> Origin:
    cache = config.teacher_cache
    return Origin(
        endpoint=f"{cache.openai.model} at {lineage.host_of(cache.openai.url)}"
        if cache.generator is Generator.openai
        else None,
        sampling=Sampling(cache.temperature, cache.top_p) if cache.temperature else None,
        seed=config.seed,
    )


def _asked(
    config: PipelineConfig, missing: Sequence[Plan], tokenizer: PreTrainedTokenizerBase, journal: Path
) -> Callable[..., Any] | None:
    """The endpoint's answers to the prompts of all shards that are missing; None where our engine answers."""
    if config.teacher_cache.generator is Generator.engine:
        return None
    from pipeline.teacher_cache.endpoint import Correspondence, Endpoint  # here: openai takes a second to import
    from pipeline.teacher_cache.replies import Api, Asking, Reader

    wanted = config.teacher_cache.openai
    endpoint = Endpoint(
        url=wanted.url,
        key=os.environ.get(wanted.api_key_env),
        concurrency=wanted.concurrency,
        timeout_seconds=wanted.timeout_seconds,
        retries=wanted.retries,
    )
    asking = Asking(
        api=Api[wanted.api.value],
        model=wanted.model,
        origin=_origin(config),
        max_new_tokens=config.teacher_cache.max_new_tokens,
        has_efforts=chat_format_of(tokenizer).has_efforts,
        extra=wanted.extra,
    )
    correspondence = Correspondence(endpoint, asking, Reader(tokenizer, asking.max_new_tokens), journal)
    correspondence.fetch([row for one in missing for row in one.rows])
    return correspondence.answer


def _layout(config: PipelineConfig, draft: DraftConfig) -> Layout:
    stored = lineage.feature_store(config)
    if stored is FeatureStore.none:
        return Layout(stored=stored.value, feature_size=0, num_tapped=0)
    return Layout(stored=stored.value, feature_size=draft.feature_size, num_tapped=len(draft.tapped_layers))


def _staging(config: PipelineConfig, settings: Mapping[str, Any]) -> Path:
    """Where a shard is built on its way to a bucket."""
    name = f"{artifacts.fingerprint_of(settings)[:12]}-{config.teacher_cache.writer}.upload"
    return Path(config.output_dir) / lineage.TEACHER_CACHE / name


def _clear(config: PipelineConfig, path: Place, mine: Sequence[Plan], reports: Mapping[Place, Any]) -> None:
    """Remove what an earlier run left half made; of other writers' shards nothing is known here."""
    root = artifacts.scratch_of(path)
    if isinstance(path, Path):
        artifacts.open_scratch(path, resume=True)
    if config.teacher_cache.num_writers == 1:
        shards.clear_except(root, reports)
        return
    for one in mine:
        if one.path not in reports:
            places.remove(one.path)


@contextlib.contextmanager
def _alone(config: PipelineConfig, path: Place) -> Iterator[None]:
    """One writer at a time completes a cache in a directory; in a bucket all would write the same bytes."""
    if config.teacher_cache.num_writers == 1 or not isinstance(path, Path):
        yield
        return
    file = path.with_name(path.name + ".lock")
    with open(file, "w") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)  # ends with the process, however that ends
        yield
        if artifacts.exists(path):
            file.unlink(missing_ok=True)


def _tell_missing(config: PipelineConfig, plans: Sequence[Plan], reports: Mapping[Place, Any]) -> None:
    num_writers = config.teacher_cache.num_writers
    missing = [index for index, one in enumerate(plans) if one.path not in reports]
    log.info(
        "teacher_cache: this writer's %d shards are complete; %d of %d are still missing, of the writers %s. The one "
        "that ends last completes the cache; if all have ended, run any of them again",
        len(plans[config.teacher_cache.writer :: num_writers]),
        len(missing),
        len(plans),
        ", ".join(str(writer) for writer in sorted({index % num_writers for index in missing})),
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
    if config.teacher_cache.verify:
        tokenizer = load_tokenizer(target.path)
        rows, _ = _rendered(config, tokenizer)
        teacher = _teacher(config, target.path, lineage.draft_config(config, target), tokenizer)
        failed = {line["prompt_id"]: line["failed"] for line in _lines_of(made.path) if line.get("failed")}
        answered = _answered(rows["train"], failed)
        _log_verified(tracker, _verified(config, made.path, answered, teacher, tokenizer))
    summary = json.loads((made.path / SUMMARY).read_text())
    _log_summary(tracker, summary, made.contract)
    log.info("teacher_cache: complete, nothing to do (%d tokens): %s", summary["num_tokens"], made.path)


def _verified(
    config: PipelineConfig,
    root: Place,
    rows: Sequence[Rendered],
    teacher: Teacher,
    tokenizer: PreTrainedTokenizerBase,
) -> Verified | None:
    """What `teacher_cache.verify` asks for: a share of the train sequences, read again by the target."""
    if not config.teacher_cache.verify:
        return None
    split = store.open_split(root, "train")
    is_ours = config.teacher_cache.generator is Generator.engine
    return verify(
        split,
        sample(split.num_sequences, config.teacher_cache.verify, config.seed),
        [row.token_ids for row in rows],
        teacher.capture,
        functools.partial(channels, channel_tokens(tokenizer)),
        tie_gap=shards.TIE_GAP[config.target.precision.value] if is_ours else None,
        is_exact=config.target.precision is Precision.float32,
    )


def _log_verified(tracker: Run, verified: Verified | None) -> None:
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


def _require_positions(config: PipelineConfig, draft: DraftConfig) -> None:
    wanted = config.teacher_cache.max_prompt_tokens + config.teacher_cache.max_new_tokens
    if wanted > draft.max_position_embeddings:
        raise PipelineError(
            f"teacher_cache.max_prompt_tokens + teacher_cache.max_new_tokens is {wanted}; the target has "
            f"{draft.max_position_embeddings} positions: lower either"
        )


def _rendered(
    config: PipelineConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, list[Rendered]], PromptSet]:
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
        "teacher_cache: %d prompts = %d train + %d held out + %d skipped (and %d repeated, %d over prompts.count)",
        len(found.prompts),
        used["train"],
        used["heldout"],
        len(skipped),
        found.num_duplicates,
        found.num_over,
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
    return rows, found


def _require_space(
    config: PipelineConfig,
    path: Place,
    staging: Path,
    plans: Sequence[Plan],
    reports: Mapping[Place, Any],
    layout: Layout,
) -> None:
    """Tell what is still to be written, and refuse a disk that cannot hold it."""
    others = [one for one in plans if one.path not in reports]
    complete = shards.reports_of_complete(others, verify=False) | reports
    missing = [one for one in plans if one.path not in complete]
    longest = config.teacher_cache.max_new_tokens
    sizes = [_largest_bytes(one, longest, layout) for one in missing]
    is_local = isinstance(path, Path)
    log.info(
        "teacher_cache: at most %d tokens of %d bytes (features: %s) in %d shards, %.1f MiB; %s; the time is told when "
        "the first shard is made",
        sum(_largest_tokens(one, longest) for one in missing),
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


def _largest_tokens(one: Plan, max_new_tokens: int) -> int:
    return sum(len(row.token_ids) + max_new_tokens for row in one.rows)


def _largest_bytes(one: Plan, max_new_tokens: int, layout: Layout) -> int:
    return store.estimated_bytes(_largest_tokens(one, max_new_tokens), len(one.rows), 1, layout)


def _teacher(
    config: PipelineConfig, directory: Path, draft: DraftConfig, tokenizer: PreTrainedTokenizerBase
) -> Teacher:
    here = machine(config.mesh, directory)
    model, weights = read_target(config, directory, here)
    return Teacher(
        weights=weights,
        config=model,
        tapped_layers=() if lineage.feature_store(config) is FeatureStore.none else draft.tapped_layers,
        stop_token_ids=tuple(stop_token_ids(tokenizer)),
        channel_tokens=channel_tokens(tokenizer),
        slots=config.teacher_cache.batch_size,
        max_prompt_tokens=config.teacher_cache.max_prompt_tokens,
        max_new_tokens=config.teacher_cache.max_new_tokens,
        origin=_origin(config),
        here=here,
    )


def _make_shards(
    plans: Sequence[Plan], reports: dict[Place, Any], teacher: Teacher, layout: Layout, staging: Path
) -> tuple[float, int]:
    """Make the shards that are missing, adding their reports; returns seconds and tokens generated."""
    total = sum(len(one.rows) for one in plans)
    done = sum(report["num_sequences"] + len(report.get("failed", ())) for report in reports.values())
    if done:
        log.info("teacher_cache: going on; %d of %d shards are complete", len(reports), len(plans))
    started, num_new = time.monotonic(), 0
    with Progress("teacher_cache", total, "sequences", done=done) as progress:

        def count(one: Finished) -> None:
            nonlocal num_new
            num_new += len(one.token_ids)
            progress.advance(1, f"{num_new / (time.monotonic() - started):.0f} tokens/s")

        missing = [one for one in plans if one.path not in reports]
        for index, one in enumerate(missing):
            report = reports[one.path] = shards.make(one, teacher, layout, count, staging)
            progress.advance(len(report.get("failed", ())))
            if index == 0 and len(missing) > 1:
                _tell_time(time.monotonic() - started, one, missing[1:], reports[one.path])
    return time.monotonic() - started, num_new


def _tell_time(seconds: float, first: Plan, rest: Sequence[Plan], report: Mapping[str, Any]) -> None:
    share = sum(len(one.rows) for one in rest) / len(first.rows)
    log.info(
        "teacher_cache: the first shard took %.0f s, compiling included; %d more take about %.1f hours and %.1f MiB",
        seconds,
        len(rest),
        seconds * share / 3600,
        report["bytes"] * share / MIB,
    )


def _check(
    config: PipelineConfig, root: Place, rows: Sequence[Rendered], teacher: Teacher, draft: DraftConfig
) -> Checked:
    return check(
        store.open_split(root, "heldout"),
        [row.token_ids for row in rows],
        teacher.capture,
        block_size=draft.block_size,
        vocab_size=draft.vocab_size,
        tie_gap=shards.TIE_GAP[config.target.precision.value],
        is_exact=config.target.precision is Precision.float32,
        seed=config.seed,
        origin=teacher.origin,
    )


def _failed(reports: Mapping[Place, dict[str, Any]]) -> dict[str, str]:
    """The prompts that got no answer, and why."""
    return {one["prompt_id"]: one["reason"] for report in reports.values() for one in report.get("failed", ())}


def _answered(rows: Sequence[Rendered], failed: Mapping[str, str]) -> list[Rendered]:
    """The rows that have a sequence in the cache."""
    return [row for row in rows if row.skipped is None and row.prompt.prompt_id not in failed]


def _contract(wanted: Contract, rows: Mapping[str, Sequence[Rendered]]) -> Contract:
    """The contract with the efforts that were rendered: a row of a JSONL file may bring its own."""
    efforts = {row.prompt.effort for several in rows.values() for row in several if row.skipped is None}
    return dataclasses.replace(wanted, text=dataclasses.replace(wanted.text, reasoning_efforts=sorted(efforts)))


def _summary(
    rows: Mapping[str, Sequence[Rendered]],
    found: PromptSet,
    plans: Sequence[Plan],
    reports: Mapping[Place, dict[str, Any]],
    draft: DraftConfig,
    layout: Layout,
) -> dict[str, Any]:
    """Every prompt accounted for, and what was made of them; no times, so that equal runs have equal bytes."""
    splits = {}
    for split, several in rows.items():
        made = [reports[one.path] for one in plans if one.split == split]
        gaps = [item["gap"] for report in made for item in report["disagreements"]]
        splits[split] = {
            "num_prompts": len(several),
            "num_skipped": sum(row.skipped is not None for row in several),
            "num_failed": sum(len(report.get("failed", ())) for report in made),
            "num_disagreements": len(gaps),
            "largest_gap": max(gaps, default=0.0),
            "num_tokens_by_channel": {
                channel.name: sum(report["num_tokens_by_channel"][channel.name] for report in made)
                for channel in Channel
            },
            **{
                key: sum(report[key] for report in made)
                for key in ("num_sequences", "num_tokens", "num_generated_tokens", "num_stopped")
            },
        }
        divergence = sum(
            (Divergence(**report["divergence"]) for report in made if "divergence" in report), Divergence()
        )
        if divergence.num_tokens:
            splits[split]["divergence"] = divergence.mean
        counted = (splits[split][f"num_{kind}"] for kind in ("sequences", "failed", "skipped"))
        assert sum(counted) == len(several), splits[split]
    return {
        "splits": splits,
        "num_duplicates": found.num_duplicates,
        "num_over_count": found.num_over,
        "num_sequences": sum(split["num_sequences"] for split in splits.values()),
        "num_tokens": sum(split["num_tokens"] for split in splits.values()),
        "num_skipped": sum(split["num_skipped"] for split in splits.values()),
        "num_failed": sum(split["num_failed"] for split in splits.values()),
        "bytes": sum(reports[one.path]["bytes"] for one in plans),
        "features": layout.stored,
        "token_bytes": layout.token_bytes,
        "tapped_layers": list(draft.tapped_layers),
    }


def _prompt_lines(rows: Mapping[str, Sequence[Rendered]], failed: Mapping[str, str]) -> bytes:
    lines = [
        {
            "prompt_id": row.prompt.prompt_id,
            "split": split,
            "effort": row.prompt.effort,
            "messages": [message.as_dict() for message in row.prompt.messages],
            **({"tools": [tool.as_dict() for tool in row.prompt.tools]} if row.prompt.tools else {}),
            "num_tokens": len(row.token_ids),
            "skipped": row.skipped,
            "failed": failed.get(row.prompt.prompt_id),
        }
        for split, several in rows.items()
        for row in several
    ]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()


def _lines_of(root: Place) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / PROMPTS).read_text().split("\n") if line]


def _log_summary(tracker: Run, summary: Mapping[str, Any], contract: Mapping[str, Any]) -> None:
    tracker.log_json(SUMMARY, summary)
    tracker.log_json(artifacts.CONTRACT, contract)
    tracker.log_metrics(
        {
            "teacher_cache/num_sequences": summary["num_sequences"],
            "teacher_cache/num_tokens": summary["num_tokens"],
            "teacher_cache/bytes": summary["bytes"],
            "teacher_cache/skipped": summary["num_skipped"],
            "teacher_cache/failed": summary["num_failed"],
        }
    )
