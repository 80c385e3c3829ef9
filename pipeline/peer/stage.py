"""`stage=peer`: compares decoding at batch 1 with another program's: same weights, prompts and machine."""

from pathlib import Path
from typing import Any

from pipeline.bench import workload
from pipeline.config.schema import PipelineConfig
from pipeline.engine.config import EngineConfig
from pipeline.engine.engine import Engine
from pipeline.errors import PipelineError
from pipeline.peer import decoding
from pipeline.tracking.run import Run
from pipeline.workspace.loading import load_draft, load_target, runtime_for
from pipeline.workspace.workspace import DRAFT, Workspace


def run(config: PipelineConfig, tracker: Run) -> dict[str, Any]:
    """Compares, prints the lines and logs them. Raises PipelineError without a command to compare with."""
    wanted = config.peer
    if not wanted.command:
        raise PipelineError(
            "peer.command is empty; give the program to compare with, as in "
            "'peer.command=[.venv-oracle/bin/python,tests/oracles/gpt_oss_speed.py]'"
        )
    if config.target.adapter is not None:
        raise PipelineError(
            f"target.adapter is {config.target.adapter}; the other program reads target.path without it, and would "
            "decode another model: write the merged model with PEFT's merge_and_unload, and give that as target.path"
        )
    workspace, chosen = Workspace(config), config.prompts
    runtime = runtime_for(config.mesh, workspace.target.path)
    target = load_target(config.target, workspace.target.path, runtime)
    models, draft = {"model": str(workspace.target.path), "dtype": config.target.precision.value}, None
    if wanted.draft:
        models["draft"] = str(workspace.open(DRAFT).path)
        draft = load_draft(config.target.precision, Path(models["draft"]), runtime)
    prompts = workload.held_out(workspace.prompts.prompts, chosen.heldout_fraction)
    rendered = workload.rendered(prompts, workspace.tokenizer, date=chosen.date)
    requests = workload.requests_of(
        rendered, num_prompts=wanted.num_prompts, max_new_tokens=wanted.max_new_tokens, prompt_tokens=None
    )
    engine = EngineConfig(  # without stop tokens: every answer has the same length
        num_slots=1,
        max_length=max(len(one.prompt_ids) for one in requests) + wanted.max_new_tokens,
        prefill_chunk=config.engine.prefill_chunk,
        page_size=config.engine.page_size,
    )
    found = decoding.compare_decoding(
        Engine(target, draft, engine, runtime),
        requests,
        wanted.command,
        models,
        wanted.repeats,
    )
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
