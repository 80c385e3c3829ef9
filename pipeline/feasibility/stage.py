"""`stage=feasibility`: what any draft could give on a machine, and what making one costs, before one is trained."""

import dataclasses
import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.artifacts.files import disk_errors, write_json
from pipeline.config.fields import TEACHER_CACHE
from pipeline.config.schema import PipelineConfig, plain
from pipeline.cost import memory_traffic
from pipeline.cost.chips import CHIPS
from pipeline.engine.expert_choices import expert_choices
from pipeline.errors import PipelineError
from pipeline.feasibility import compiled, measured, report, step_times
from pipeline.feasibility.bill import Bill, Texts, bill
from pipeline.feasibility.expert_traffic import ExpertTraffic
from pipeline.feasibility.step_times import Hardware, StepTimes
from pipeline.model.dflash.config import DFlashConfig
from pipeline.model.gpt_oss.config import GptOssConfig
from pipeline.model.gpt_oss.weights import WeightFormat
from pipeline.model.hf.directory import open_target
from pipeline.store import reader
from pipeline.store.layout import CacheLayout
from pipeline.tracking.run import Run
from pipeline.workspace import specs
from pipeline.workspace.loading import adapter_of, is_held_packed, load_target, runtime_for, runtime_for_heads
from pipeline.workspace.settings import feature_store
from pipeline.workspace.workspace import Workspace

log = logging.getLogger("pipeline")

RESULTS = "feasibility.json"
TRAFFIC_SEQUENCES = 256
HERE = "this machine"


def run(config: PipelineConfig, tracker: Run) -> dict[str, Any]:
    """Prints both tables, writes and logs the values, returns them."""
    wanted = config.feasibility
    model, packed = _sizes(config)
    drafts = [
        specs.draft_sizes(dataclasses.replace(config.draft, block_size=size), model, mask_token_id=0)
        for size in sorted({*wanted.block_sizes, config.draft.block_size})
    ]
    traffic = _traffic(config, model) if wanted.traffic else None
    machines = {f"{wanted.num_devices} x {name}": _machine(config, name) for name in wanted.chips}
    found: dict[str, list[StepTimes]] = {
        name: _of_roofline(config, model, drafts, machine, traffic, packed=packed) for name, machine in machines.items()
    }
    if wanted.report is not None:
        found[Path(wanted.report).stem] = compiled.from_report(Path(wanted.report), concurrency=config.serve.slots)
    if wanted.measure:
        found[HERE] = _measured(config, model, drafts, packed=packed)
    if not found:
        raise PipelineError(
            "feasibility.chips is empty; name chips, or set feasibility.measure=true or feasibility.report"
        )
    bills = {name: _bill(config, drafts, machine, found[name]) for name, machine in machines.items()}
    price = None if wanted.price_per_hour is None else wanted.price_per_hour * wanted.num_devices
    experts = _experts(config, model, drafts, traffic)
    print(report.times_table(found, wanted.accept_lengths, wanted.accept_rate), flush=True)
    print(report.experts_table(experts), flush=True)
    if bills:
        print(report.bill_table(bills, price), flush=True)
    shown = functools.partial(report.values, rate=wanted.accept_rate, price_per_hour=price)
    values = {
        "target": config.target.name,
        "settings": plain(wanted),
        "times": {name: [shown(one) for one in times] for name, times in found.items()},
        "experts": experts,
        "bills": {name: dataclasses.asdict(one) for name, one in bills.items()},
    }
    _write(config, values, tracker)
    return values


def _sizes(config: PipelineConfig) -> tuple[GptOssConfig, bool]:
    """Returns the target's sizes, and whether its experts are held as MXFP4; no weights are read."""
    sizes = config.target.architecture
    if sizes is not None:
        return specs.architecture(sizes), is_held_packed(config.target, sizes.packed)
    if config.target.path is None:
        raise PipelineError(
            "stage=feasibility needs the sizes of a target, not its weights; choose target=gpt_oss_20b, "
            "target=gpt_oss_120b or another with target.architecture, or target=local with target.path"
        )
    opened = open_target(Workspace(config).target.path, adapter_of(config.target))
    return opened.config, is_held_packed(config.target, opened.is_packed)


def _machine(config: PipelineConfig, name: str) -> Hardware:
    wanted = config.feasibility
    if name not in CHIPS:
        raise PipelineError(f"feasibility.chips has {name}; it must be of {', '.join(CHIPS)}")
    return Hardware(
        chip=CHIPS[name],
        num_devices=wanted.num_devices,
        bandwidth_share=wanted.bandwidth_share,
        peak_share=wanted.peak_share,
        agreement=wanted.agreement,
        host_seconds=wanted.host_seconds,
    )


def _of_roofline(
    config: PipelineConfig,
    model: GptOssConfig,
    drafts: Sequence[DFlashConfig],
    machine: Hardware,
    traffic: ExpertTraffic | None,
    *,
    packed: bool,
) -> list[StepTimes]:
    context = config.feasibility.context
    return [
        step_times.from_roofline(
            model, draft, machine, concurrency=count, context=context, packed=packed, traffic=traffic
        )
        for count in config.feasibility.concurrencies
        for draft in drafts
    ]


def _traffic(config: PipelineConfig, model: GptOssConfig) -> ExpertTraffic:
    """Returns the experts that the target chooses for the answers of the teacher cache, of a sample of them."""
    workspace = Workspace(config)
    cache = workspace.open(TEACHER_CACHE)
    runtime = runtime_for(config.mesh, workspace.target.path)
    target = load_target(config.target, workspace.target.path, runtime)
    split = reader.open_split(cache.path, "train")
    step = max(split.num_sequences // TRAFFIC_SEQUENCES, 1)
    indices = list(range(0, split.num_sequences, step))[:TRAFFIC_SEQUENCES]
    sequences = split.read(indices, features=False)
    texts = [one.token_ids.tolist() for one in sequences]
    log.info("feasibility: counting the experts of %d answers", len(texts))
    answers = {
        index: choices[sequences[index].prompt_tokens :]
        for index, choices in expert_choices(target, texts, runtime=runtime)
    }
    return ExpertTraffic(model, tuple(answers[index] for index in range(len(texts))), config.seed)


def _experts(
    config: PipelineConfig, model: GptOssConfig, drafts: Sequence[DFlashConfig], traffic: ExpertTraffic | None
) -> list[dict[str, Any]]:
    found = []
    for count in config.feasibility.concurrencies:
        for block in [1, *(draft.block_size for draft in drafts)]:
            one = {
                "concurrency": count,
                "block_size": block,
                "at_random": memory_traffic.experts_hit(model, count * block),
                "modelled": step_times.modelled_experts(model, count, block, config.feasibility.agreement),
            }
            if traffic is not None:
                one["counted"] = traffic.distinct(count, block)
                if block > 1:
                    one["agreement"] = traffic.agreement(block)
            found.append(one)
    return found


def _measured(
    config: PipelineConfig, model: GptOssConfig, drafts: Sequence[DFlashConfig], *, packed: bool
) -> list[StepTimes]:
    runtime = runtime_for_heads(config.mesh, [model.num_key_value_heads, drafts[0].num_key_value_heads])
    weight_format = WeightFormat(config.target.precision.value, packed, runtime.execution.shards)
    return measured.measure(
        model,
        drafts,
        weight_format,
        specs.bench_engine(config.engine),
        runtime,
        concurrencies=config.feasibility.concurrencies,
        seed=config.seed,
    )


def _bill(
    config: PipelineConfig, drafts: Sequence[DFlashConfig], machine: Hardware, times: Sequence[StepTimes]
) -> Bill:
    wanted = config.feasibility
    draft = next(one for one in drafts if one.block_size == config.draft.block_size)
    fastest = max(one.tokens_per_second() for one in times)
    layout = CacheLayout(
        stored=feature_store(config).value,
        feature_size=draft.feature_size,
        num_tapped=len(draft.tapped_layers),
    )
    texts = Texts(
        num_prompts=config.prompts.count or specs.GENERATED_PROMPTS,
        prompt_tokens=wanted.prompt_tokens,
        answer_tokens=wanted.answer_tokens,
    )
    return bill(
        draft,
        texts,
        layout,
        machine,
        plain_tokens_per_second=fastest,
        num_steps=config.train.steps,
        batch_sequences=config.train.batch_sequences,
        anchors=config.train.anchors_per_sequence,
    )


def _write(config: PipelineConfig, values: dict[str, Any], tracker: Run) -> None:
    path = Path(config.output_dir) / "feasibility" / f"{config.target.name}.json"
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, values)
    tracker.log_json(RESULTS, values)
    for name, times in values["times"].items():
        for one in times:
            prefix = f"feasibility/{name}/{one['concurrency']}_at_once/block_{one['block_size']}"
            names = ("break_even_accept_length", "largest_speedup")
            tracker.log_metrics({f"{prefix}/{key}": one[key] for key in names})
    log.info("feasibility: the values are in %s", path)
