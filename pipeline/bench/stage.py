"""`stage=bench`: measures acceptance, speed and losslessness of an exported draft, on held-out prompts."""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline import distributed
from pipeline.artifacts.artifact import Artifact
from pipeline.artifacts.hashing import fingerprint_of
from pipeline.bench import (
    arms,
    breakdown,
    engines,
    guards,
    leaks,
    loading,
    loads,
    losslessness,
    machine,
    random_text,
    record,
    report,
    servers,
    table,
)
from pipeline.bench.arms import DFLASH, PLAIN, Comparison
from pipeline.bench.breakdown import Labels
from pipeline.bench.guards import Selection
from pipeline.bench.intervals import speedup_interval, speedup_of
from pipeline.bench.losslessness import Losslessness
from pipeline.config.fields import CHECKPOINT, DRAFT, TEACHER_CACHE
from pipeline.config.schema import BenchConfig, PipelineConfig, plain
from pipeline.engine.request import Request
from pipeline.errors import PipelineError
from pipeline.prompts.channels import channel_tokens
from pipeline.prompts.sources import Prompt
from pipeline.store import reader
from pipeline.store.checkpoint_files import EVALUATION
from pipeline.tracking.run import Run
from pipeline.workspace.workspace import Workspace

log = logging.getLogger("pipeline")


def run(config: PipelineConfig, tracker: Run) -> dict[str, Any]:
    """Measures, prints the table, writes and logs the record, returns it. Raises PipelineError for wrong tokens.

    Also when prompts are among the draft's training texts, or no text at all.
    """
    workspace = Workspace(config)
    exported = workspace.open(DRAFT)
    models = loading.Models(workspace, exported)
    prompts = loading.prompts(workspace, exported, models)
    rendered = loading.rendered(workspace, prompts)
    requests = loading.requests_for(workspace, rendered)
    asked, rendered = prompts[: len(requests)], rendered[: len(requests)]
    cache = workspace.ancestor(exported, TEACHER_CACHE)
    trained_on = None if cache is None else reader.open_split(cache.path, "train")
    leaks.require_unseen(asked, rendered, trained_on)
    random_text.require_text(rendered, workspace.model.vocab_size)
    if config.bench.plain_url is not None:
        measured, lossless = _measure_servers(workspace, exported, requests, asked)
    else:
        measured, lossless = _measure_engines(workspace, exported, models, requests, asked)
    measured |= {"machine": machine.machine(), **record.identity(workspace, exported)}
    measured["prompts_fingerprint"] = fingerprint_of([one.prompt_id for one in asked])
    if trained_on is not None:
        measured["training_tokens"] = int(trained_on.num_tokens.sum())
    block_size = exported.contract["draft"]["block_size"]
    print(table.results_table(measured, block_size), flush=True)
    for name, show in (
        ("prompt_sets", table.prompt_set_table),
        ("profile", table.profile_table),
        ("sweep", table.sweep_table),
        ("open_loop", table.open_loop_table),
    ):
        if measured.get(name):
            print(show(measured[name]), flush=True)
    if distributed.is_primary():
        trained = exported.parents.get(CHECKPOINT)
        weights = exported.fingerprint if trained is None else trained.fingerprint
        record.write(
            workspace,
            exported,
            measured,
            lossless,
            config=plain(config),
            prompts=asked,
            weights=weights,
            tracker=tracker,
        )
    if lossless.bugs:
        first = lossless.bugs[0]
        raise PipelineError(
            f"DFLASH changed {len(lossless.bugs)} of {lossless.num_answers} answers, which is a bug: "
            f"{first.request_id} differs at token {first.position} (plain {first.plain_token}, DFLASH "
            f"{first.dflash_token}) where the target's two best logits are "
            f"{first.logit_gap:.4f} apart (a tie is below {lossless.tie_gap})"
        )
    return measured


def _measure_engines(
    workspace: Workspace,
    exported: Artifact,
    models: loading.Models,
    requests: Sequence[Request],
    prompts: Sequence[Prompt],
) -> tuple[dict[str, Any], Losslessness]:
    """Returns what two engines of this process give, and others beside them where they are asked for."""
    config, wanted = workspace.config, workspace.config.bench
    networks = models.networks(requests)
    profiles = engines.profiles(networks, wanted.profile_slots, config.engine.max_length)
    all_arms = engines.engine_arms(networks, wanted.block_sizes, is_adaptive=wanted.adaptive)
    comparison = _compare(all_arms, requests, wanted)
    slow, fast = comparison.plain[0].answers, comparison.dflash[0].answers
    lossless = losslessness.compare_answers(slow, fast, requests, networks.target, networks.runtime)
    measured, selection = _values(workspace, exported, comparison, lossless, requests, prompts)
    context = sum(len(one.prompt_ids) for one in requests) // len(requests)
    speed = measured["plain_tokens_per_second"]
    measured["plain_share_of_machine"] = engines.plain_share_of_machine(networks, speed, context)
    measured["open_loop"] = _open_loop(all_arms, requests, config)
    measured["sweep"] = loads.at_once(
        lambda slots: {name: networks.arm(has_draft=name == DFLASH, num_slots=slots) for name in (PLAIN, DFLASH)},
        requests,
        wanted.sweep_slots,
        wanted.repeats,
    )
    measured["profile"] = engines.profile_values(profiles)
    measured["warnings"] = guards.warnings_of(measured, selection, wanted.max_looping)
    return measured, lossless


def _measure_servers(
    workspace: Workspace, exported: Artifact, requests: Sequence[Request], prompts: Sequence[Prompt]
) -> tuple[dict[str, Any], Losslessness]:
    """Returns what two running servers give."""
    config, wanted = workspace.config, workspace.config.bench
    with servers.server_arms(workspace, exported) as arms_of:
        both = arms_of(wanted.slots)
        comparison = _compare(both, requests, wanted)
        open_loop = _open_loop(both, requests, config)
        points = loads.at_once(arms_of, requests, wanted.sweep_slots, wanted.repeats)
    lossless = servers.judge(workspace, comparison, requests)
    measured, selection = _values(workspace, exported, comparison, lossless, requests, prompts)
    measured |= {"open_loop": open_loop, "sweep": points}
    measured["warnings"] = guards.warnings_of(measured, selection, wanted.max_looping)
    return measured, lossless


def _open_loop(
    pair: Mapping[str, arms.Arm], requests: Sequence[Request], config: PipelineConfig
) -> list[dict[str, float]]:
    wanted = config.bench
    return loads.arriving(
        pair,
        requests,
        wanted.request_rates,
        ttft_seconds=wanted.slo.ttft_seconds,
        tpot_seconds=wanted.slo.tpot_seconds,
        seed=config.seed,
    )


def _compare(all_arms: Mapping[str, arms.Arm], requests: Sequence[Request], wanted: BenchConfig) -> Comparison:
    """Compares arms until the interval is as narrow as wanted, or no repeat makes it so."""

    def wants_more(found: Comparison) -> bool:
        if wanted.interval is None:
            return False
        names = [one.request_id for one in requests]
        plain, dflash = (found.times(arm, names) for arm in (PLAIN, DFLASH))
        speedup, count = speedup_of(plain, dflash), len(found.plain)
        width = speedup_interval(plain, dflash).relative_half_width(speedup)
        if width <= wanted.interval:
            return False
        by_prompts = speedup_interval(plain, dflash, passes_vary=False).relative_half_width(speedup)
        if by_prompts > wanted.interval:
            log.warning(
                "bench: bench.interval is %.3f; these %d prompts alone make it %.3f, however often they are repeated: "
                "raise bench.num_prompts or prompts.count",
                wanted.interval,
                len(names),
                by_prompts,
            )
            return False
        if count >= wanted.max_repeats:
            log.warning("bench: bench.interval is %.3f; it is %.3f after %d passes", wanted.interval, width, count)
            return False
        return True

    return arms.compare_arms(all_arms, requests, wanted.repeats, on_pass=loads.log_pass, wants_more=wants_more)


def _values(
    workspace: Workspace,
    exported: Artifact,
    comparison: Comparison,
    lossless: Losslessness,
    requests: Sequence[Request],
    prompts: Sequence[Prompt],
) -> tuple[dict[str, Any], Selection]:
    """Returns the values of the record that follow from the passes, and which answers they are of."""
    wanted = workspace.config.bench
    selection = guards.select(comparison.plain[0].answers, wanted.max_looping)
    measured = report.results(
        comparison, lossless, _evaluations(workspace.config, exported), selection, num_at_once=wanted.slots
    )
    labels = [Labels(family=one.family, effort=one.effort) for one in prompts] if wanted.prompt_tokens is None else []
    by: dict[str, Any] = report.breakdowns(comparison, selection, labels)
    tokens = channel_tokens(workspace.tokenizer)
    if tokens.message is not None:
        ids = {one.request_id: one.prompt_ids for one in requests}
        answers = [comparison.dflash[0].answers[name] for name in selection.request_ids]
        channels = breakdown.by_channel(
            answers, [ids[name] for name in selection.request_ids], tokens, comparison.acceptance.block_size
        )
        by |= {"channel": channels} if channels else {}
    measured["by"] = by
    measured["prompt_sets"] = report.by_prompt_set(comparison, selection, labels) if wanted.prompt_sets else {}
    measured["arms"] = report.arm_speedups(comparison, selection)
    return measured, selection


def _evaluations(config: PipelineConfig, exported: Artifact) -> dict[str, Any]:
    """Returns what training and export measured on held-out texts; nothing where prompts or answers are others."""
    bench = config.bench
    is_other = bench.prompt_tokens is not None or bench.temperature or bench.prompt_sets
    if is_other or EVALUATION not in exported.files:
        return {}
    return json.loads((exported.path / EVALUATION).read_text())
