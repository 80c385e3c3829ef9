"""`stage=bench`: measures acceptance, speed and losslessness of an exported draft, on held-out prompts."""

import dataclasses
import functools
import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import distributed
from pipeline.artifacts import artifact, provenance
from pipeline.artifacts.artifact import Artifact, Parent
from pipeline.artifacts.contract import Contract
from pipeline.artifacts.files import disk_errors, write_json
from pipeline.bench import arms, losslessness, report, workload
from pipeline.bench.losslessness import Losslessness
from pipeline.config.fields import DRAFT
from pipeline.config.schema import PipelineConfig, plain
from pipeline.engine import step_profile
from pipeline.engine.config import EngineConfig
from pipeline.engine.engine import Engine
from pipeline.engine.request import Request
from pipeline.engine.step_profile import StepProfile
from pipeline.errors import PipelineError
from pipeline.model.dflash.model import DraftModel
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.parallel.runtime import Runtime
from pipeline.prompts.sources import Prompt
from pipeline.store.checkpoint_files import EVALUATION
from pipeline.tracking.run import Run
from pipeline.workspace.loading import load_draft, load_target, runtime_for
from pipeline.workspace.workspace import Workspace

log = logging.getLogger("pipeline")

RESULTS = "results.json"
BENCHMARK, VERSION = "benchmark", 2  # the kind of artifact, and of its settings


def run(config: PipelineConfig, tracker: Run) -> dict[str, Any]:
    """Measures, prints and logs the table, writes results.json, returns it. Raises PipelineError for wrong tokens."""
    workspace = Workspace(config)
    exported = workspace.open(DRAFT)
    directory = Path(str(exported.path))  # drafts are on a disk
    runtime = runtime_for(config.mesh, workspace.target.path, draft=directory)
    target = load_target(config.target, workspace.target.path, runtime)
    draft = load_draft(config.target.precision, directory, runtime)
    prompts = workload.held_out(workspace.prompts.prompts, config.prompts.heldout_fraction)
    requests = _requests(workspace, prompts)
    engine = EngineConfig(
        num_slots=config.bench.slots,
        max_length=max(len(request.prompt_ids) + request.max_new_tokens for request in requests),
        prefill_chunk=config.engine.prefill_chunk,
        page_size=config.engine.page_size,
        samples=config.bench.temperature > 0,
        stop_token_ids=workspace.stop_token_ids,
    )
    profiles = _profiles(config, engine, target, draft, runtime)
    comparison = arms.compare_arms(
        Engine(target, None, engine, runtime),
        Engine(target, draft, engine, runtime),
        requests,
        config.bench.repeats,
        _log_pass,
    )
    slow, fast = comparison.plain[0].answers, comparison.dflash[0].answers
    lossless = losslessness.compare_answers(slow, fast, requests, target, runtime)
    families = [] if config.bench.prompt_tokens is not None else [prompt.family for prompt in prompts]
    measured = report.results(comparison, lossless, _evaluations(config, exported))
    measured |= report.by_family(comparison, families)
    print(report.results_table(measured, draft.config.block_size), flush=True)
    if profiles:
        print(report.profile_table(profiles), flush=True)
        tracker.log_metrics(report.profile_metrics(profiles))

    contract = dataclasses.replace(
        Contract.from_json(exported.contract),
        target=workspace.target.contract.target,
        provenance=provenance.provenance("bench", plain(config), {DRAFT: exported.fingerprint}),
    )
    if distributed.is_primary():
        _write(workspace, exported, measured, lossless, contract, tracker.run_id)
    tracker.log_metrics({name: value for name, value in measured.items() if isinstance(value, (int, float))})
    by_family = measured.get(report.BY_FAMILY, {})
    tracker.log_metrics({f"accept_length/{family}": length for family, length in by_family.items()})
    tracker.log_json(artifact.CONTRACT, contract.to_json())
    tracker.log_json(RESULTS, measured)
    if lossless.bugs:
        first = lossless.bugs[0]
        raise PipelineError(
            f"DFLASH changed {len(lossless.bugs)} of {lossless.num_answers} answers, which is a bug: "
            f"{first.request_id} differs at token {first.position} (plain {first.plain_token}, DFLASH "
            f"{first.dflash_token}) where the target's two best logits are "
            f"{first.logit_gap:.4f} apart (a tie is below {lossless.tie_gap})"
        )
    return measured


def _profiles(
    config: PipelineConfig, sizes: EngineConfig, target: TargetModel, draft: DraftModel, runtime: Runtime
) -> dict[int, tuple[StepProfile, StepProfile]]:
    """Returns what single steps cost, plain and DFLASH, for the numbers of slots that are asked for."""
    found = {}
    for slots in config.bench.profile_slots:
        each = dataclasses.replace(
            sizes, num_slots=slots, max_length=config.engine.max_length, stop_token_ids=(), cache_tokens=None
        )
        found[slots] = (
            step_profile.profile(functools.partial(Engine, target, None, each, runtime)),
            step_profile.profile(functools.partial(Engine, target, draft, each, runtime)),
        )
    return found


def _requests(workspace: Workspace, prompts: Sequence[Prompt]) -> list[Request]:
    wanted = workspace.config.bench
    requests = workload.requests_of(
        workload.rendered(prompts, workspace.tokenizer, date=workspace.config.prompts.date),
        num_prompts=wanted.num_prompts,
        max_new_tokens=wanted.max_new_tokens,
        prompt_tokens=wanted.prompt_tokens,
    )
    if wanted.temperature:
        requests = workload.sampled(requests, wanted.temperature, workspace.config.seed)
    if len(requests) < wanted.num_prompts:
        log.info("bench: the prompt set holds out %d prompts; all are used", len(requests))
    return requests


def _evaluations(config: PipelineConfig, exported: Artifact) -> dict[str, Any]:
    """Returns what training and export measured on held-out texts; nothing where prompts or answers are others."""
    if config.bench.prompt_tokens is not None or config.bench.temperature or EVALUATION not in exported.files:
        return {}
    return json.loads((exported.path / EVALUATION).read_text())


def _log_pass(arm: str, one: arms.ArmPass) -> None:
    log.info("bench: %-6s %6.0f tokens/s (%d tokens)", arm, one.tokens_per_second, one.decode_tokens)


def _write(
    workspace: Workspace,
    exported: Artifact,
    measured: Mapping[str, Any],
    lossless: Losslessness,
    contract: Contract,
    run_id: str,
) -> None:
    """Writes a measurement as an artifact of its own, never reused: its path has the time and the run in it."""
    config = workspace.config
    settings = {"bench": plain(config.bench), "precision": config.target.precision.value}
    key = artifact.key_of(BENCHMARK, VERSION, settings, {DRAFT: exported.key or exported.fingerprint})
    started = time.strftime("%Y%m%d-%H%M%S")
    path = workspace.root / "bench" / config.target.name / f"{started}-{run_id[:8] or key}"
    with disk_errors(path):
        scratch = artifact.open_scratch(path, resume=False)
        differences = [dataclasses.asdict(one) for one in lossless.differences]
        write_json(scratch / RESULTS, {**measured, "differences": differences})
        artifact.seal(
            path,
            kind=BENCHMARK,
            key=key,
            settings=settings,
            parents={DRAFT: Parent(key=exported.key or "", fingerprint=exported.fingerprint)},
            contract=contract.to_json(),
        )
    log.info("bench: results are in %s", path)
