"""`stage=bench`: acceptance, speed and losslessness of an exported draft, on held-out prompts."""

import dataclasses
import json
import logging
import time
from pathlib import Path
from typing import Any

from pipeline import artifacts, hosts, lineage
from pipeline.artifacts import PipelineError
from pipeline.bench import arms, losslessness, report, workload
from pipeline.bench.losslessness import Losslessness
from pipeline.config import PipelineConfig, plain
from pipeline.dflash.contract import Contract
from pipeline.machine import machine, read_draft, read_target
from pipeline.prompts import chat_format
from pipeline.prompts.tokenizer import load_tokenizer
from pipeline.serve.engine import Draft, Engine
from pipeline.serve.scheduler import Request
from pipeline.tracking import Run

log = logging.getLogger("pipeline")

RESULTS = "results.json"


def run(config: PipelineConfig, tracker: Run) -> dict[str, float]:
    """Measure, print the table, log it, keep results.json and return it; wrong tokens raise after all that."""
    target = lineage.target(config)
    exported = lineage.exported_draft(config, target)
    here = machine(config.mesh, target.path, draft=exported.path)
    model, weights = read_target(config, target.path, here)
    draft_config, draft_weights = read_draft(config, exported.path, here)
    tokenizer = load_tokenizer(target.path)
    prompts, chosen = lineage.prompt_set(config).prompts, config.prompts
    rendered = workload.held_out(prompts, chosen.heldout_fraction, tokenizer, date=chosen.date)
    requests = workload.requests_of(
        rendered,
        num_prompts=config.bench.num_prompts,
        max_new_tokens=config.bench.max_new_tokens,
        prompt_tokens=config.bench.prompt_tokens,
    )
    if len(requests) < config.bench.num_prompts:
        log.info("bench: the prompt set holds out %d prompts; all are used", len(requests))

    def engine(draft: Draft | None) -> Engine:
        return Engine(
            weights,
            model,
            stop_token_ids=chat_format.stop_token_ids(tokenizer),
            slots=config.bench.slots,
            max_length=_longest(requests),
            prefill_chunk=config.serve.prefill_chunk,
            draft=draft,
            run=here.run,
            mesh=here.mesh,
        )

    comparison = arms.compare(
        engine(None), engine(Draft(draft_weights, draft_config)), requests, config.bench.repeats, _tell
    )
    slow, fast = comparison.plain[0].answers, comparison.dflash[0].answers
    lossless = losslessness.compare(slow, fast, requests, weights, model, here.run, here.mesh)
    measured = report.results(comparison, lossless, _said(config, exported.path))
    print(report.table(measured, draft_config.block_size), flush=True)

    contract = Contract.from_json(exported.contract)
    provenance = artifacts.provenance("bench", plain(config), {lineage.DRAFT: exported.fingerprint})
    contract = dataclasses.replace(contract, target=target.contract.target, provenance=provenance)
    if hosts.is_first():
        _write(config, exported.fingerprint, measured, lossless, contract)
    tracker.log_metrics({name: value for name, value in measured.items() if isinstance(value, (int, float))})
    tracker.log_json(artifacts.CONTRACT, contract.to_json())
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


def _said(config: PipelineConfig, draft: Path) -> dict[str, Any]:
    """What training and export said of the held-out texts, where this measures such texts."""
    evaluation = draft / lineage.EVALUATION
    if config.bench.prompt_tokens is not None or not evaluation.is_file():
        return {}
    return json.loads(evaluation.read_text())


def _longest(requests: list[Request]) -> int:
    return max(len(request.prompt_ids) + request.max_new_tokens for request in requests)


def _tell(arm: str, one: arms.Pass) -> None:
    log.info("bench: %-6s %6.0f tokens/s (%d tokens)", arm, one.tokens_per_second, one.decode_tokens)


def _write(
    config: PipelineConfig, draft: str, measured: dict[str, float], lossless: Losslessness, contract: Contract
) -> None:
    """Keep a measurement as an artifact of its own: never reused, so its address has the time in it."""
    settings = {"draft": draft, "bench": plain(config.bench), "precision": config.target.precision.value}
    stem = artifacts.address(Path(config.output_dir), "bench", config.target.name, settings)
    path = stem / time.strftime("%Y%m%d-%H%M%S")
    with artifacts.disk_errors(path):
        scratch = artifacts.open_scratch(path, resume=False)
        differences = [dataclasses.asdict(one) for one in lossless.differences]
        artifacts.write_json(scratch / RESULTS, {**measured, "differences": differences})
        artifacts.seal(path, kind="benchmark", settings=settings, contract=contract.to_json())
    log.info("bench: results are in %s", path)
