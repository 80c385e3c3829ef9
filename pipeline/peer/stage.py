"""`stage=peer`: plain decoding at batch 1 against another program's, same weights, prompts, machine and run."""

import logging
from typing import Any

from pipeline import lineage
from pipeline.artifacts import PipelineError
from pipeline.bench import peer, workload
from pipeline.config import PipelineConfig
from pipeline.machine import machine, read_target
from pipeline.prompts.tokenizer import load_tokenizer
from pipeline.serve.engine import Engine
from pipeline.tracking import Run

log = logging.getLogger("pipeline")


def run(config: PipelineConfig, tracker: Run) -> dict[str, Any]:
    """Compare, print the line, log it."""
    wanted = config.peer
    if not wanted.command:
        raise PipelineError(
            "peer.command is empty; give the program to compare with, as in "
            "'peer.command=[.venv-oracle/bin/python,tests/oracles/gpt_oss_speed.py]'"
        )
    target = lineage.target(config)
    here = machine(config.mesh, target.path)
    model, weights = read_target(config, target.path, here)
    tokenizer = load_tokenizer(target.path)
    prompts, chosen = lineage.prompt_set(config).prompts, config.prompts
    rendered = workload.held_out(prompts, chosen.heldout_fraction, tokenizer, date=chosen.date)
    requests = workload.requests_of(
        rendered, num_prompts=wanted.num_prompts, max_new_tokens=wanted.max_new_tokens, prompt_tokens=None
    )
    engine = Engine(
        weights,
        model,
        stop_token_ids=(),  # every answer has the same length
        slots=1,
        max_length=max(len(one.prompt_ids) for one in requests) + wanted.max_new_tokens,
        prefill_chunk=config.serve.prefill_chunk,
        run=here.run,
        mesh=here.mesh,
    )
    found = peer.compare(engine, requests, wanted.command, target.path, config.target.precision.value, wanted.repeats)
    measured = found.metrics()
    ours, theirs, ratio, lowest, highest = (
        measured[f"peer/{name}"]
        for name in ("ours_tokens_per_second", "theirs_tokens_per_second", "ratio", "ratio_min", "ratio_max")
    )
    print(
        f"{config.target.name}, {config.target.precision.value}, batch 1, {len(requests)} prompts of "
        f"{wanted.max_new_tokens} tokens\n"
        f"ours    {ours:8.1f} tokens/s\n"
        f"theirs  {theirs:8.1f} tokens/s ({wanted.command[-1]})\n"
        f"ratio   {ratio:8.2f} ({lowest:.2f} to {highest:.2f})\n"
        f"equal   {found.num_equal} of {found.num_answers} answers",
        flush=True,
    )
    tracker.log_metrics(measured)
    return measured
