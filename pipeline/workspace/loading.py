"""Chooses mesh and kernels for the machine at hand, and loads target and draft onto its devices."""

import logging
import math
from pathlib import Path
from typing import Any

import jax

from pipeline import progress
from pipeline.config.choices import ExpertWeights, Precision
from pipeline.config.schema import MeshConfig, TargetConfig
from pipeline.model import placement
from pipeline.model.dflash.model import DraftModel
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.gpt_oss.weights import WeightFormat
from pipeline.model.hf import gpt_oss as hf_gpt_oss
from pipeline.model.hf.directory import open_target, read_config, read_draft, read_draft_config, read_target
from pipeline.model.parallel.execution import Execution, KernelBackend
from pipeline.model.parallel.runtime import Runtime
from pipeline.model.parallel.shards import Shards

log = logging.getLogger("pipeline")

BACKENDS = {"cpu": KernelBackend.xla, "gpu": KernelBackend.cudnn, "tpu": KernelBackend.pallas_tpu}
# measured: stage=roofline
MAX_PER_EXPERT_TOKENS = {KernelBackend.xla: 512, KernelBackend.cudnn: 64, KernelBackend.pallas_tpu: 256}


def runtime_for(config: MeshConfig, directory: Path, *, draft: Path | None = None) -> Runtime:
    """Returns the runtime for the target in `directory`, and a draft beside it.

    Raises PipelineError when the mesh does not fit the devices there are.
    """
    networks = [read_config(path) for path in (directory, draft) if path is not None]
    return runtime_for_heads(config, [network.get("num_key_value_heads", 1) for network in networks])


def runtime_for_heads(config: MeshConfig, heads: list[int]) -> Runtime:
    """Returns the runtime for networks with these numbers of key/value heads."""
    is_cpu = jax.default_backend() == "cpu"
    shards = choose_shards(config, 1 if is_cpu else jax.device_count(), heads)
    backend = BACKENDS[jax.default_backend()]
    execution = Execution(shards, backend, MAX_PER_EXPERT_TOKENS[backend])
    return Runtime(execution, placement.make_mesh(shards, jax.devices()) if shards.is_split else None)


def runtime_for_slice(shards: Shards, devices: list[Any]) -> Runtime:
    """Returns the runtime of a TPU slice, which need not be here."""
    backend = KernelBackend.pallas_tpu
    return Runtime(Execution(shards, backend, MAX_PER_EXPERT_TOKENS[backend]), placement.make_mesh(shards, devices))


def choose_shards(config: MeshConfig, num_devices: int, heads: list[int]) -> Shards:
    """Returns the mesh that was chosen, or one for `num_devices` where nothing was.

    A model is split as far as the numbers of key/value heads allow: an expert that is hit is then read by all devices
    together, while experts split one from another are read by the few that have them.
    """
    chosen = (config.data, config.expert, config.tensor)
    if any(size is not None for size in chosen):
        return Shards(*(size or 1 for size in chosen))
    tensor = math.gcd(num_devices, *heads)
    return Shards(num_devices // tensor, 1, tensor)


def is_held_packed(config: TargetConfig, packed_files: bool) -> bool:
    """Returns whether experts are held as MXFP4: as the files are, unless `target.weights` says otherwise."""
    return packed_files if config.weights is None else config.weights is ExpertWeights.mxfp4


def adapter_of(config: TargetConfig) -> Path | None:
    """Returns the directory of the adapter that is merged into the target."""
    return None if config.adapter is None else Path(config.adapter)


def load_target(config: TargetConfig, directory: Path, runtime: Runtime) -> TargetModel:
    """Reads the target, each part of its weights onto the devices that need it; logs what they take."""
    opened = open_target(directory, adapter_of(config))
    packed = is_held_packed(config, opened.is_packed)
    weight_format = WeightFormat(config.precision.value, packed, runtime.execution.shards)
    shardings = None
    if runtime.mesh is not None:
        placement.require_divisible_target(opened.config, weight_format)
        shardings = placement.target_shardings(opened.config, weight_format, runtime.mesh)
    target = read_target(opened, weight_format, shardings)
    _log_size(config.name, target, weight_format)
    return target


def _log_size(name: str, target: TargetModel, weight_format: WeightFormat) -> None:
    """Logs what the weights take on the devices of this host, and per parameter of one copy of the model."""
    leaves = jax.tree.leaves(target)
    num_bytes = sum(part.data.nbytes for leaf in leaves for part in leaf.addressable_shards)
    count = hf_gpt_oss.num_parameters(target.config)
    log.info(
        "%s: %.4g million parameters, %s, %.2f bytes each; %siB on %d of %d devices",
        name,
        count / 1e6,
        "experts MXFP4" if weight_format.packed else weight_format.dtype,
        sum(leaf.nbytes for leaf in leaves) / count,
        progress.binary_amount(num_bytes),
        len(leaves[0].addressable_shards),
        len(leaves[0].sharding.device_set),
    )


def load_draft(precision: Precision, directory: Path, runtime: Runtime) -> DraftModel:
    """Reads the draft in the target's precision, each part of its weights onto the devices that need it."""
    dtype = precision.value
    if runtime.mesh is None:
        return read_draft(directory, dtype)
    sizes = read_draft_config(directory)
    placement.require_divisible_draft(sizes, runtime.execution.shards)
    return read_draft(directory, dtype, placement.draft_shardings(sizes, dtype, runtime.mesh))
