"""`stage=teacher_cache`: prompts -> the target's answers and the features of its tapped layers, on disk."""

import dataclasses
import functools
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline import artifacts, lineage
from pipeline.artifacts import Artifact, PipelineError
from pipeline.config import FeatureStore, Generator, PipelineConfig, Precision
from pipeline.dflash.contract import Contract
from pipeline.machine import machine, read_target
from pipeline.model.draft import DraftConfig
from pipeline.model.sampling import Sampling
from pipeline.places import Place
from pipeline.progress import Progress
from pipeline.prompts.channels import channel_tokens, channels
from pipeline.prompts.chat_format import chat_format_of, stop_token_ids
from pipeline.prompts.sources import PromptSet
from pipeline.prompts.split import split_by_hash
from pipeline.prompts.tokenizer import load_tokenizer
from pipeline.serve.engine import Finished
from pipeline.teacher_cache import forecast, shards, store
from pipeline.teacher_cache.check import Checked, check
from pipeline.teacher_cache.generate import Rendered, render
from pipeline.teacher_cache.origin import Origin
from pipeline.teacher_cache.shards import Plan, Teacher
from pipeline.teacher_cache.store import Layout
from pipeline.teacher_cache.summary import PROMPTS, SUMMARY, answered, failures, failures_of, prompt_lines, summarise
from pipeline.teacher_cache.verify import Verified, sample, verify
from pipeline.teacher_cache.writers import Writer
from pipeline.tracking import Run

log = logging.getLogger("pipeline")

MIB = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Work:
    """What is to be made of which prompts, and where."""

    config: PipelineConfig
    target: lineage.Target
    settings: dict[str, Any]
    path: Place
    draft: DraftConfig
    layout: Layout
    tokenizer: PreTrainedTokenizerBase
    rows: dict[str, list[Rendered]]
    found: PromptSet
    plans: list[Plan]
    writer: Writer
    staging: Path  # a shard on its way to a bucket

    @property
    def root(self) -> Place:
        """Where it is built."""
        return artifacts.scratch_of(self.path)


def run(config: PipelineConfig, tracker: Run) -> None:
    """Make the teacher cache of this configuration, or this writer's share of it, or say that it is there."""
    target = lineage.target(config)
    if artifacts.exists(lineage.teacher_cache_address(config, target)):
        _reuse(config, target, tracker)
        return
    work = _work(config, target)
    mine, others = work.writer.share(work.plans)
    reports = shards.reports_of_complete(mine)
    complete = reports | shards.reports_of_complete(others, verify=False)
    missing = [one for one in work.plans if one.path not in complete]
    forecast.require_space(work.path, work.staging, missing, work.layout, config.teacher_cache.max_new_tokens)

    with artifacts.disk_errors(work.path if isinstance(work.path, Path) else work.staging):
        own = [one for one in mine if one.path not in reports]
        journal = work.staging.with_suffix(".answers.jsonl")
        elsewhere = _asked(config, own, work.tokenizer, journal)
        teacher = dataclasses.replace(_teacher(config, target.path, work.draft, work.tokenizer), elsewhere=elsewhere)
        forecast.tell_time(teacher, [row for one in own for row in one.rows])
        work.writer.clear(work.path, mine, reports)
        tokens_per_second = _make_shards(mine, reports, teacher, work.layout, work.staging)
        journal.unlink(missing_ok=True)
        with work.writer.alone(work.path):
            complete = reports | shards.reports_of_complete(others, verify=False)
            if artifacts.exists(work.path):
                log.info("teacher_cache: another writer has completed it")
                _reuse(config, target, tracker)
            elif len(complete) < len(work.plans):
                work.writer.tell_missing(work.plans, complete)
            else:
                _complete(work, complete, teacher, tracker)
    tracker.log_metrics({"teacher_cache/tokens_per_second": tokens_per_second})


def _work(config: PipelineConfig, target: lineage.Target) -> _Work:
    path, settings = lineage.teacher_cache_address(config, target), lineage.teacher_cache_settings(config, target)
    draft, tokenizer = lineage.draft_config(config, target), load_tokenizer(target.path)
    _require_positions(config, draft)
    rows, found = _rendered(config, tokenizer)
    writer = Writer(config.teacher_cache.writer, config.teacher_cache.num_writers)
    name = f"{artifacts.fingerprint_of(settings)[:12]}-{writer.index}.upload"
    return _Work(
        config=config,
        target=target,
        settings=settings,
        path=path,
        draft=draft,
        layout=_layout(config, draft),
        tokenizer=tokenizer,
        rows=rows,
        found=found,
        plans=shards.plan(artifacts.scratch_of(path), rows, config.teacher_cache.shard_sequences, settings),
        writer=writer,
        staging=Path(config.output_dir) / lineage.TEACHER_CACHE / name,
    )


def _complete(work: _Work, reports: Mapping[Place, dict[str, Any]], teacher: Teacher, tracker: Run) -> None:
    """Check the cache of which all shards are there, say what it holds, and seal it."""
    config, root, rows = work.config, work.root, work.rows
    beside = (store.HEADER, SUMMARY, PROMPTS, artifacts.CONTRACT, artifacts.MANIFEST)
    # in a bucket another writer may be completing it too: what both write over is not removed
    shards.clear_except(root, {*reports, *(root / name for name in beside)})
    num_shards = {split: sum(one.split == split for one in work.plans) for split in store.SPLITS}
    store.write_header(root, work.layout, num_shards)
    failed = failures(reports)
    checked = _check(config, root, answered(rows["heldout"], failed), teacher, work.draft)
    verified = _verified(config, root, answered(rows["train"], failed), teacher, work.tokenizer)
    tapped = work.draft.tapped_layers
    summary = summarise(rows, work.found, work.plans, reports, tapped_layers=tapped, layout=work.layout)
    artifacts.write_bytes(root / PROMPTS, prompt_lines(rows, failed))
    artifacts.write_json(root / SUMMARY, summary)
    provenance = artifacts.provenance("teacher_cache", work.settings, {"target": work.target.fingerprint})
    contract = _contract(lineage.cache_contract(config, work.target, provenance), rows).to_json()
    made = artifacts.seal(
        work.path,
        kind=lineage.TEACHER_CACHE,
        settings=work.settings,
        contract=contract,
        listed=[*store.listed(num_shards), PROMPTS, SUMMARY],
    )
    _log_summary(tracker, summary, made.contract)
    _log_checked(tracker, checked, summary, made)
    _log_verified(tracker, verified)


def _log_checked(tracker: Run, checked: Checked, summary: Mapping[str, Any], made: Artifact) -> None:
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


def _reuse(config: PipelineConfig, target: lineage.Target, tracker: Run) -> None:
    made, settings = lineage.teacher_cache(config, target), lineage.teacher_cache_settings(config, target)
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
        rows_read = answered(rows["train"], failures_of(made.path))
        _log_verified(tracker, _verified(config, made.path, rows_read, teacher, tokenizer))
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
) -> float:
    """Make the shards that are missing, adding their reports; returns the tokens generated a second."""
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
                forecast.tell_rest(time.monotonic() - started, one, missing[1:], reports[one.path])
    return num_new / (time.monotonic() - started) if num_new else 0.0


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


def _contract(wanted: Contract, rows: Mapping[str, Sequence[Rendered]]) -> Contract:
    """The contract with the efforts that were rendered: a row of a JSONL file may bring its own."""
    efforts = {row.prompt.effort for several in rows.values() for row in several if row.skipped is None}
    return dataclasses.replace(wanted, text=dataclasses.replace(wanted.text, reasoning_efforts=sorted(efforts)))


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
