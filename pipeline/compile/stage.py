"""`stage=compile`: the runtime's programs and the training step compiled for a TPU slice that need not be there."""

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.errors import JaxRuntimeError

from pipeline import artifacts, lineage
from pipeline.artifacts import PipelineError
from pipeline.compile import chips, programs, report
from pipeline.compile.chips import Slice
from pipeline.compile.program_text import parse
from pipeline.compile.programs import DECODE, PREFILL, Serving
from pipeline.compile.report import Costs, Told
from pipeline.config import CompileConfig, FeatureSource, PipelineConfig, plain
from pipeline.machine import choose_shards, is_held_packed, on_slice
from pipeline.model import attention, checkpoints, placement, traffic
from pipeline.model.draft import DraftConfig
from pipeline.model.gpt_oss_config import GptOssConfig, is_packed
from pipeline.model.gpt_oss_weights import WeightsForm
from pipeline.serve.engine import num_positions
from pipeline.tracking import Run
from pipeline.train import environment
from pipeline.train.stage import recipe_of

log = logging.getLogger("pipeline")

REPORT = "compile.json"
TRAIN, FEATURES = "train", "features"


def run(config: PipelineConfig, tracker: Run) -> None:
    """Compile, print the table, log it; raise when a program does not compile or fit, or reads what it should not."""
    found = chips.slice_of(config.topology)
    model, packed = _model(config)
    draft = lineage.draft_sizes(config, model, mask_token_id=0)
    sizes = _serving(config, found, model, draft, packed)
    shards = sizes.run.shards
    log.info(
        "compile: %s on %s (%d devices: data %d, expert %d, tensor %d), experts %s, %d slots of %d tokens",
        config.target.name,
        found.name,
        len(found.devices),
        shards.data,
        shards.expert,
        shards.tensor,
        "MXFP4" if packed else "bfloat16",
        sizes.slots,
        sizes.max_length,
    )
    all_told = []
    for name, trace in _programs(config, sizes, draft):
        all_told.append(_compiled(name, trace, sizes, draft, found, config.compile))
        told = all_told[-1]
        log.info("compile: %s: %s", name, "; ".join(told.problems) or f"in {told.seconds_to_compile:.1f} s")
    print(report.table(all_told, found.chip), flush=True)
    _keep(config, all_told, tracker)
    problems = [f"{one.name}: {problem}" for one in all_told for problem in one.problems]
    if problems:
        raise PipelineError(f"{config.target.name} on {config.topology}:\n  " + "\n  ".join(problems))


def _model(config: PipelineConfig) -> tuple[GptOssConfig, bool]:
    """The model, and whether its experts are held packed; no weights are needed."""
    sizes = config.target.architecture
    if sizes is not None:
        return lineage.architecture(sizes), is_held_packed(config.target, sizes.packed)
    values = checkpoints.read_config(Path(config.target.path))
    return GptOssConfig.from_hf(values), is_held_packed(config.target, is_packed(values))


def _serving(config: PipelineConfig, found: Slice, model: GptOssConfig, draft: DraftConfig, packed: bool) -> Serving:
    shards = choose_shards(config.mesh, len(found.devices), [model.num_key_value_heads, draft.num_key_value_heads])
    form = WeightsForm(programs.DTYPE, packed, shards)
    placement.require_divisible(model, form)
    placement.require_divisible_draft(draft, shards)
    here = on_slice(shards, found.devices)
    slots = -(-config.serve.slots // shards.data) * shards.data
    return Serving(
        model=model,
        form=form,
        run=here.run,
        mesh=here.mesh,
        slots=slots,
        max_length=config.serve.max_length,
        prefill_chunk=config.serve.prefill_chunk,
    )


def _programs(config: PipelineConfig, sizes: Serving, draft: DraftConfig) -> Iterator[tuple[str, Callable[[], Any]]]:
    yield from programs.lowered(sizes, draft, config.compile.block_sizes)
    if config.compile.training:
        if config.train.features is FeatureSource.live:
            rows, longest = _training_rows(config, sizes), _longest(config)
            yield (
                FEATURES,
                lambda: programs.lowered_features(sizes, draft, num_rows=rows, num_positions=longest),
            )
        yield TRAIN, lambda: _training(config, sizes, draft)


def _training_rows(config: PipelineConfig, sizes: Serving) -> int:
    unit = sizes.mesh.devices.size * config.train.accumulation
    return -(-config.train.batch_sequences // unit) * unit


def _longest(config: PipelineConfig) -> int:
    return config.teacher_cache.max_prompt_tokens + config.teacher_cache.max_new_tokens


def _training(config: PipelineConfig, sizes: Serving, draft: DraftConfig) -> Any:
    environment.prepare()
    from pipeline.train import lowered  # imports EasyDeL, which only now can be

    train, devices = config.train, list(sizes.mesh.devices.flat)
    rows = _training_rows(config, sizes)
    recipe = recipe_of(train, draft, config.seed, jnp.dtype(programs.DTYPE))
    longest = _longest(config)
    num_positions = train.pack_tokens or longest
    return lowered.lowered_step(
        draft,
        dataclasses.replace(recipe, batch_sequences=rows),
        devices,
        num_positions=num_positions,
        num_anchors=-(-train.anchors_per_sequence * max(num_positions, longest) // longest),
        packed=train.pack_tokens is not None,
    )


def _compiled(
    name: str, trace: Callable[[], Any], sizes: Serving, draft: DraftConfig, found: Slice, config: CompileConfig
) -> Told:
    started = time.monotonic()
    try:
        made = trace().compile()
    except JaxRuntimeError as error:  # what the compiler refuses, a program too large for the memory among it
        reason = " ".join(line.strip() for line in str(error).splitlines()[:3])
        return Told(name=name, seconds_to_compile=time.monotonic() - started, problems=(f"does not compile: {reason}",))
    seconds = time.monotonic() - started
    memory, counted, program = made.memory_analysis(), made.cost_analysis(), parse(made.as_text())
    estimate = counted.get("optimal_seconds", -1.0)
    told = Told(
        name=name,
        seconds_to_compile=seconds,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        costs=Costs(
            flops=counted["flops"],
            bytes=counted["bytes accessed"],
            seconds=estimate if estimate > 0 else None,
            floor_seconds=_floor(name, counted["flops"], sizes, draft, found, config.context),
        ),
        copied_bytes=report.copied_bytes(program),
        collectives=tuple(program.collectives()),
    )
    lengths = _cache_lengths(sizes, config.block_sizes)
    problems = report.does_not_fit(told, found.chip) + report.gathered_caches(program, lengths, sizes.model.head_dim)
    if name not in (PREFILL, TRAIN, FEATURES):  # many tokens read all experts
        problems += report.experts_read_whole(program)
    return dataclasses.replace(told, problems=tuple(problems))


def _floor(name: str, flops: float, sizes: Serving, draft: DraftConfig, found: Slice, context: int) -> float:
    """Seconds that one device takes at the least to read what the step needs, or to multiply."""
    rows = sizes.slots // sizes.run.shards.data
    tokens, drafted = 1, 0.0
    if name in (TRAIN, FEATURES):
        return flops / found.chip.flops_per_second
    if name == PREFILL:
        tokens = sizes.prefill_chunk
    elif name != DECODE:
        tokens = int(name.split()[1])
        drafted = traffic.draft_bytes(draft, rows, context)
    read = traffic.target_bytes(sizes.model, rows, tokens, context, packed=sizes.form.packed) + drafted
    return max(read / sizes.run.shards.model / found.chip.bytes_per_second, flops / found.chip.flops_per_second)


def _cache_lengths(sizes: Serving, block_sizes: list[int]) -> set[int]:
    """How long caches are in some program, rings among them."""
    lengths = set()
    for block in (1, *block_sizes):
        whole = num_positions(sizes.max_length, sizes.prefill_chunk, block)
        lengths |= {attention.cache_positions(whole), sizes.model.sliding_window + block}
    return lengths


def _keep(config: PipelineConfig, all_told: list[Told], tracker: Run) -> None:
    values = {
        "target": plain(config.target),
        "topology": config.topology,
        "programs": [dataclasses.asdict(one) for one in all_told],
    }
    path = Path(config.output_dir) / "compile" / f"{config.target.name}-{config.topology.replace(':', '-')}.json"
    with artifacts.disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        artifacts.write_json(path, values)
    tracker.log_json(REPORT, values)
    for one in all_told:
        if one.costs is not None:
            name = one.name.replace(" ", "_")
            tracker.log_metrics(
                {
                    f"compile/{name}_hbm_bytes": one.hbm_bytes,
                    f"compile/{name}_flops": one.costs.flops,
                    f"compile/{name}_floor_seconds": one.costs.floor_seconds,
                }
            )
    log.info("compile: the report is in %s", path)
