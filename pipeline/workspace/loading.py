"""What a stage runs on: devices, mesh and kernels; and the target and the draft, read to where they run."""

import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from pipeline import progress
from pipeline.config import ExpertWeights, MeshConfig, PipelineConfig, TargetConfig
from pipeline.model import checkpoints, hf_target, placement
from pipeline.model.draft import DraftConfig, DraftWeights
from pipeline.model.execution import PLAIN, Execution, Kernels
from pipeline.model.gpt_oss_config import GptOssConfig, is_packed
from pipeline.model.gpt_oss_weights import GptOssWeights, WeightsForm
from pipeline.model.sharding import Shards

log = logging.getLogger("pipeline")

KERNELS = {"cpu": Kernels.xla, "gpu": Kernels.cudnn, "tpu": Kernels.pallas_tpu}
FEW_TOKENS = {Kernels.xla: 512, Kernels.cudnn: 64, Kernels.pallas_tpu: 256}  # measured: stage=roofline


@dataclasses.dataclass(frozen=True)
class Machine:
    """How programs run here: `mesh` None is one device."""

    run: Execution = PLAIN
    mesh: Mesh | None = None


ONE_DEVICE = Machine()


def machine(config: MeshConfig, directory: Path, *, draft: Path | None = None) -> Machine:
    """The machine for the target in `directory`, and a draft beside it.

    Raises PipelineError when the mesh does not fit the devices there are.
    """
    configs = [checkpoints.read_config(one) for one in (directory, draft) if one is not None]
    return machine_for(config, [one.get("num_key_value_heads", 1) for one in configs])


def machine_for(config: MeshConfig, heads: list[int]) -> Machine:
    """The machine for networks with these numbers of key/value heads."""
    is_cpu = jax.default_backend() == "cpu"
    shards = choose_shards(config, 1 if is_cpu else jax.device_count(), heads)
    kernels = KERNELS[jax.default_backend()]
    run = Execution(shards, kernels, FEW_TOKENS[kernels])
    return Machine(run, placement.make_mesh(shards, jax.devices()) if shards.split else None)


def on_slice(shards: Shards, devices: list[Any]) -> Machine:
    """The machine that a TPU slice is."""
    kernels = Kernels.pallas_tpu
    return Machine(Execution(shards, kernels, FEW_TOKENS[kernels]), placement.make_mesh(shards, devices))


def choose_shards(config: MeshConfig, num_devices: int, heads: list[int]) -> Shards:
    """The mesh that was chosen, or one for `num_devices` where nothing was.

    A model is split as far as the numbers of key/value heads allow: whatever an expert that is hit weighs is then
    read by all devices together, while experts split one from another are read by the few that have them.
    """
    given = (config.data, config.expert, config.tensor)
    if any(size is not None for size in given):
        return Shards(*(size or 1 for size in given))
    tensor = math.gcd(num_devices, *heads)
    return Shards(num_devices // tensor, 1, tensor)


def weights_form(config: PipelineConfig, directory: Path, shards: Shards) -> WeightsForm:
    """How the target's weights are held here."""
    packed = is_held_packed(config.target, is_packed(checkpoints.read_config(directory)))
    return WeightsForm(config.target.precision.value, packed, shards)


def is_held_packed(config: TargetConfig, packed_files: bool) -> bool:
    """Whether experts are held as MXFP4: as the files are, unless `target.weights` says otherwise."""
    return packed_files if config.weights is None else config.weights is ExpertWeights.mxfp4


def read_target(config: PipelineConfig, directory: Path, here: Machine) -> tuple[GptOssConfig, GptOssWeights]:
    """The target's weights, each part on the devices that need it; what they take is logged."""
    form = weights_form(config, directory, here.run.shards)
    places = None
    if here.mesh is not None:
        model = GptOssConfig.from_hf(checkpoints.read_config(directory))
        placement.require_divisible(model, form)
        places = placement.target_places(model, form, here.mesh)
    model, weights = checkpoints.load_target(directory, form, places)
    _tell_size(config.target.name, model, weights, form)
    return model, weights


def _tell_size(name: str, model: GptOssConfig, weights: GptOssWeights, form: WeightsForm) -> None:
    """Log what the weights take on the devices of this host, and per parameter of one copy of the model."""
    leaves = jax.tree.leaves(weights)
    here = sum(part.data.nbytes for leaf in leaves for part in leaf.addressable_shards)
    count = hf_target.num_parameters(model)
    log.info(
        "%s: %.4g million parameters, %s, %.2f bytes each; %siB on %d of %d devices",
        name,
        count / 1e6,
        "experts MXFP4" if form.packed else form.dtype,
        sum(leaf.nbytes for leaf in leaves) / count,
        progress.binary_amount(here),
        len(leaves[0].addressable_shards),
        len(leaves[0].sharding.device_set),
    )


def read_draft(config: PipelineConfig, directory: Path, here: Machine) -> tuple[DraftConfig, DraftWeights]:
    """The draft's weights in the target's precision, each part on the devices that need it."""
    dtype = config.target.precision.value
    if here.mesh is None:
        return checkpoints.load_draft(directory, dtype)
    sizes = checkpoints.read_draft_config(directory)
    placement.require_divisible_draft(sizes, here.run.shards)
    return checkpoints.load_draft(directory, dtype, placement.draft_places(sizes, dtype, here.mesh))
