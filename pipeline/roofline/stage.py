"""`stage=roofline`: measures how near the target's passes come to the limit of the machine's memory."""

import dataclasses
import logging
from typing import Any

from pipeline.config.schema import PipelineConfig, RooflineConfig
from pipeline.cost import machine_speed
from pipeline.errors import PipelineError
from pipeline.model import placement
from pipeline.model.gpt_oss.config import GptOssConfig
from pipeline.model.gpt_oss.weights import WeightFormat, is_fused
from pipeline.model.parallel.execution import Execution
from pipeline.roofline import passes as roofline
from pipeline.roofline.passes import RooflinePass
from pipeline.tracking.run import Run
from pipeline.workspace import specs
from pipeline.workspace.loading import is_held_packed, runtime_for_heads

log = logging.getLogger("pipeline")

RESULTS = "roofline.json"


def run(config: PipelineConfig, tracker: Run) -> dict[str, Any]:
    """Times the target's passes and its experts at random weights, prints both tables and logs them."""
    sizes = config.target.architecture
    if sizes is None:
        raise PipelineError("stage=roofline times a target of target.architecture; choose target=gpt_oss_20b, say")
    model = specs.architecture(sizes)
    runtime = runtime_for_heads(config.mesh, [model.num_key_value_heads])
    weight_format = WeightFormat(
        config.target.precision.value, is_held_packed(config.target, sizes.packed), runtime.execution.shards
    )
    placement.require_divisible_target(model, weight_format)
    wanted = config.roofline
    bandwidth = machine_speed.copy_bandwidth(runtime)
    log.info(
        "roofline: %s, experts %s, %s; a copy reads and writes %.1f GB/s",
        config.target.name,
        "MXFP4" if weight_format.packed else weight_format.dtype,
        "one device" if runtime.mesh is None else f"{runtime.mesh.devices.size} devices",
        bandwidth / 1e9,
    )
    target = roofline.random_target(model, weight_format, runtime, config.seed)
    passes = _passes(wanted, runtime.execution.shards.data)
    timed = roofline.time_passes(target, weight_format, runtime, passes, repeats=wanted.repeats, bandwidth=bandwidth)
    print(roofline.pass_table(timed, bandwidth), flush=True)
    results: dict[str, Any] = {"copy_bytes_per_second": bandwidth, "passes": [dataclasses.asdict(one) for one in timed]}
    del target
    if runtime.mesh is None and not is_fused(model, weight_format):
        results["experts"] = _experts(config, model, weight_format, runtime.execution)
    metrics: dict[str, float] = {}
    for one in timed:
        name = f"roofline/{one.timed.name}_{one.timed.num_rows}"
        metrics |= {f"{name}_seconds": one.seconds, f"{name}_share_of_copy": one.share}
    tracker.log_metrics(metrics)
    tracker.log_json(RESULTS, results)
    return results


def _passes(wanted: RooflineConfig, data: int) -> list[RooflinePass]:
    """Returns the passes to time; their rows are a multiple of the copies of the model."""
    batches = [-(-batch // data) * data for batch in wanted.batches]
    prefill = [RooflinePass("prefill", data, wanted.prefill_tokens, 0)]
    decode = [RooflinePass("decode", batch, 1, wanted.context) for batch in batches]
    return prefill + decode + [RooflinePass("verify", batch, wanted.verify_tokens, wanted.context) for batch in batches]


def _experts(
    config: PipelineConfig, model: GptOssConfig, weight_format: WeightFormat, execution: Execution
) -> list[tuple[int, float, float]]:
    counts = [2**power for power in range(config.roofline.expert_tokens.bit_length()) if power % 2 == 0 or power > 4]
    costs = roofline.expert_costs(
        model, weight_format, execution, counts, repeats=config.roofline.repeats, seed=config.seed
    )
    print(roofline.expert_table(costs), flush=True)
    return costs
