"""`stage=roofline`: how near the target's passes come to what the machine's memory allows, at random weights."""

import dataclasses
import logging
from typing import Any

from pipeline import lineage
from pipeline.artifacts import PipelineError
from pipeline.bench import roofline
from pipeline.bench.roofline import Pass
from pipeline.config import PipelineConfig, RooflineConfig
from pipeline.machine import is_held_packed, machine_for
from pipeline.model import placement
from pipeline.model.gpt_oss_config import GptOssConfig
from pipeline.model.gpt_oss_weights import WeightsForm, is_wide
from pipeline.tracking import Run

log = logging.getLogger("pipeline")

RESULTS = "roofline.json"


def run(config: PipelineConfig, tracker: Run) -> dict[str, Any]:
    """Time the target's passes and its experts, print both tables, log them."""
    sizes = config.target.architecture
    if sizes is None:
        raise PipelineError("stage=roofline times a target of target.architecture; choose target=gpt_oss_20b, say")
    model = lineage.architecture(sizes)
    here = machine_for(config.mesh, [model.num_key_value_heads])
    form = WeightsForm(config.target.precision.value, is_held_packed(config.target, sizes.packed), here.run.shards)
    placement.require_divisible(model, form)
    wanted = config.roofline
    bandwidth = roofline.copy_bandwidth(here)
    log.info(
        "roofline: %s, experts %s, %s; a copy reads and writes %.1f GB/s",
        config.target.name,
        "MXFP4" if form.packed else form.dtype,
        "one device" if here.mesh is None else f"{here.mesh.devices.size} devices",
        bandwidth / 1e9,
    )
    weights = roofline.random_target(model, form, here, config.seed)
    passes = _passes(wanted, here.run.shards.data)
    timed = roofline.time_passes(weights, model, form, here, passes, repeats=wanted.repeats, bandwidth=bandwidth)
    print(roofline.table(timed, bandwidth), flush=True)
    results: dict[str, Any] = {"copy_bytes_per_second": bandwidth, "passes": [dataclasses.asdict(one) for one in timed]}
    del weights
    if here.mesh is None and not is_wide(model, form):
        results["experts"] = _experts(config, model, form, here.run)
    metrics = {}
    for one in timed:
        name = f"roofline/{one.timed.name}_{one.timed.num_rows}"
        metrics |= {f"{name}_seconds": one.seconds, f"{name}_share_of_copy": one.share}
    tracker.log_metrics(metrics)
    tracker.log_json(RESULTS, results)
    return results


def _passes(wanted: RooflineConfig, data: int) -> list[Pass]:
    """Rows are a multiple of the copies of the model."""
    batches = [-(-batch // data) * data for batch in wanted.batches]
    prefill = [Pass("prefill", data, wanted.prefill_tokens, 0)]
    decode = [Pass("decode", batch, 1, wanted.context) for batch in batches]
    return prefill + decode + [Pass("verify", batch, wanted.verify_tokens, wanted.context) for batch in batches]


def _experts(
    config: PipelineConfig, model: GptOssConfig, form: WeightsForm, how: Any
) -> list[tuple[int, float, float]]:
    counts = [2**power for power in range(config.roofline.expert_tokens.bit_length()) if power % 2 == 0 or power > 4]
    costs = roofline.expert_costs(model, form, how, counts, repeats=config.roofline.repeats, seed=config.seed)
    print(roofline.expert_table(costs), flush=True)
    return costs
