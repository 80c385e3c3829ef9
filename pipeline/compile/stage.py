"""`stage=compile`: compiles the engine's steps and the training step for a TPU slice that need not be there."""

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.errors import JaxRuntimeError

from pipeline import hub
from pipeline.artifacts.files import disk_errors, write_json
from pipeline.compile import programs, report, topology
from pipeline.compile.hlo import parse
from pipeline.compile.programs import CONTEXT, DECODE, DEFERRING, DRAFT, PREFILL, ServingSizes
from pipeline.compile.report import Costs, ProgramReport
from pipeline.compile.topology import Slice
from pipeline.config.choices import FeatureSource
from pipeline.config.schema import CompileConfig, PipelineConfig, plain
from pipeline.cost import memory_traffic
from pipeline.errors import PipelineError
from pipeline.model import placement
from pipeline.model.dflash.config import DFlashConfig
from pipeline.model.gpt_oss.config import GptOssConfig, is_packed
from pipeline.model.gpt_oss.weights import WeightFormat
from pipeline.model.hf.directory import read_config, read_target_config
from pipeline.tracking.run import Run
from pipeline.train.easydel import environment
from pipeline.train.recipe import recipe_of
from pipeline.workspace import specs
from pipeline.workspace.loading import choose_shards, is_held_packed, runtime_for_slice
from pipeline.workspace.workspace import Workspace

log = logging.getLogger("pipeline")

REPORT = "compile.json"
TRAIN, FEATURES = "train", "features"


def run(config: PipelineConfig, tracker: Run) -> None:
    """Compiles, prints the table and logs it.

    Raises PipelineError when a program does not compile, does not fit, or reads or exchanges what it should not.
    """
    found = topology.slice_of(config.compile.topology)
    model, packed = _model(config)
    draft = specs.draft_sizes(config.draft, model, mask_token_id=0)
    sizes = _serving(config, found, model, draft, packed)
    shards = sizes.runtime.execution.shards
    log.info(
        "compile: %s on %s (%d devices: data %d, expert %d, tensor %d), experts %s, %d slots of %d tokens",
        config.target.name,
        found.name,
        len(found.devices),
        shards.data,
        shards.expert,
        shards.tensor,
        "MXFP4" if packed else "bfloat16",
        sizes.engine.num_slots,
        sizes.engine.max_length,
    )
    reports = []
    for name, trace in _programs(config, sizes, draft):
        compiled = _compiled(name, trace, sizes, draft, found, config.compile)
        log.info("compile: %s: %s", name, "; ".join(compiled.problems) or f"in {compiled.seconds_to_compile:.1f} s")
        reports.append(compiled)
    print(report.program_table(reports, found.chip), flush=True)
    _write(config, reports, tracker)
    problems = [f"{one.name}: {problem}" for one in reports for problem in one.problems]
    if problems:
        raise PipelineError(f"{config.target.name} on {config.compile.topology}:\n  " + "\n  ".join(problems))


def _model(config: PipelineConfig) -> tuple[GptOssConfig, bool]:
    """Returns the model's config, and whether its experts are held packed; reads no weights."""
    sizes = config.target.architecture
    if sizes is not None:
        return specs.architecture(sizes), is_held_packed(config.target, sizes.packed)
    if config.target.path is None:
        directory = Workspace(config).target.path
    else:  # a workspace would read all of it for its key
        directory, _ = hub.directory_of(config.target.path, config.target.revision, key="target.path")
    return read_target_config(directory), is_held_packed(config.target, is_packed(read_config(directory)))


def _serving(
    config: PipelineConfig, found: Slice, model: GptOssConfig, draft: DFlashConfig, packed: bool
) -> ServingSizes:
    shards = choose_shards(config.mesh, len(found.devices), [model.num_key_value_heads, draft.num_key_value_heads])
    weight_format = WeightFormat(programs.DTYPE, packed, shards)
    placement.require_divisible_target(model, weight_format)
    placement.require_divisible_draft(draft, shards)
    num_slots = -(-config.serve.slots // shards.data) * shards.data
    engine = specs.serving_engine(config.engine, num_slots)
    runtime = runtime_for_slice(shards, found.devices)
    return ServingSizes(model=model, weight_format=weight_format, engine=engine, runtime=runtime)


def _programs(
    config: PipelineConfig, sizes: ServingSizes, draft: DFlashConfig
) -> Iterator[tuple[str, Callable[[], Any]]]:
    yield from programs.lower_serving_steps(sizes, draft, config.compile.block_sizes)
    if config.compile.training:
        if config.train.features is FeatureSource.live:
            rows, longest = _training_rows(config, sizes), _longest(config)
            yield (
                FEATURES,
                lambda: programs.lower_feature_pass(sizes, draft, num_rows=rows, num_positions=longest),
            )
        yield TRAIN, lambda: _training(config, sizes, draft)


def _training_rows(config: PipelineConfig, sizes: ServingSizes) -> int:
    unit = len(_devices(sizes)) * config.train.accumulation
    return -(-config.train.batch_sequences // unit) * unit


def _devices(sizes: ServingSizes) -> list[Any]:
    assert sizes.runtime.mesh is not None, "a slice is a mesh"
    return list(sizes.runtime.mesh.devices.flat)


def _longest(config: PipelineConfig) -> int:
    return config.teacher_cache.max_prompt_tokens + config.teacher_cache.max_new_tokens


def _training(config: PipelineConfig, sizes: ServingSizes, draft: DFlashConfig) -> Any:
    environment.prepare()
    from pipeline.train.easydel import aot  # imports EasyDeL, which only now can be

    train, devices = config.train, _devices(sizes)
    rows = _training_rows(config, sizes)
    recipe = recipe_of(train, draft, config.seed, jnp.dtype(programs.DTYPE))
    longest = _longest(config)
    num_positions = train.pack_tokens or longest
    return aot.lower_train_step(
        draft,
        dataclasses.replace(recipe, batch_sequences=rows),
        devices,
        num_positions=num_positions,
        num_anchors=-(-train.anchors_per_sequence * max(num_positions, longest) // longest),
        packed=train.pack_tokens is not None,
    )


def _compiled(
    name: str, trace: Callable[[], Any], sizes: ServingSizes, draft: DFlashConfig, found: Slice, config: CompileConfig
) -> ProgramReport:
    started = time.monotonic()
    try:
        program = trace().compile()
    except JaxRuntimeError as error:  # what the compiler refuses, a program too large for the memory among it
        reason = " ".join(line.strip() for line in str(error).splitlines()[:3])
        return ProgramReport(
            name=name, seconds_to_compile=time.monotonic() - started, problems=(f"does not compile: {reason}",)
        )
    seconds = time.monotonic() - started
    memory, counted, text = program.memory_analysis(), program.cost_analysis(), parse(program.as_text())
    estimate = counted.get("optimal_seconds", -1.0)
    compiled = ProgramReport(
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
        copied_bytes=report.copied_bytes(text),
        collectives=tuple(text.collectives()),
    )
    layout = programs.page_layout_of(sizes, None)
    pages = {layout.num_pages, layout.num_sliding_pages}
    problems = report.does_not_fit(compiled, found.chip) + report.gathered_caches(text, pages, 2 * sizes.model.head_dim)
    if name not in (PREFILL, TRAIN, FEATURES):  # many tokens read all experts
        problems += report.experts_read_whole(text)
    return dataclasses.replace(compiled, problems=tuple(problems))


def _floor(name: str, flops: float, sizes: ServingSizes, draft: DFlashConfig, found: Slice, context: int) -> float:
    """Returns the least seconds that one device takes to read what the step needs, or to multiply."""
    shards = sizes.runtime.execution.shards
    rows = sizes.engine.num_slots // shards.data
    tokens, drafted = 1, 0.0
    if name in (TRAIN, FEATURES, CONTEXT):
        return flops / found.chip.flops_per_second
    if name == PREFILL:
        tokens = sizes.engine.prefill_chunk
    elif name not in (DECODE, DEFERRING):
        tokens = int(name.split()[1])
        drafted = memory_traffic.draft_bytes(draft, rows, context)
    if name.startswith(DRAFT):
        return max(drafted / shards.model / found.chip.bytes_per_second, flops / found.chip.flops_per_second)
    read = memory_traffic.target_bytes(sizes.model, rows, tokens, context, packed=sizes.weight_format.packed) + drafted
    return max(read / shards.model / found.chip.bytes_per_second, flops / found.chip.flops_per_second)


def _write(config: PipelineConfig, reports: list[ProgramReport], tracker: Run) -> None:
    values = {
        "target": plain(config.target),
        "topology": config.compile.topology,
        "programs": [dataclasses.asdict(one) for one in reports],
    }
    path = (
        Path(config.output_dir) / "compile" / f"{config.target.name}-{config.compile.topology.replace(':', '-')}.json"
    )
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, values)
    tracker.log_json(REPORT, values)
    for one in reports:
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
