"""What a stage runs on: devices, mesh and kernels; and the target and the draft, read to where they run."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from pipeline.artifacts import PipelineError
from pipeline.config import ExpertWeights, MeshConfig, PipelineConfig, TargetConfig
from pipeline.model import checkpoints, draft, gpt_oss_weights, placement
from pipeline.model.draft import DraftConfig, DraftWeights
from pipeline.model.execution import Execution, Kernels
from pipeline.model.gpt_oss_config import GptOssConfig, is_packed
from pipeline.model.gpt_oss_weights import GptOssWeights, WeightsForm
from pipeline.model.sharding import Shards

KERNELS = {"cpu": Kernels.xla, "gpu": Kernels.cudnn, "tpu": Kernels.pallas_tpu}
FEW_TOKENS = {Kernels.xla: 64, Kernels.cudnn: 64, Kernels.pallas_tpu: 256}  # measured: README, "Experts"


@dataclasses.dataclass(frozen=True)
class Machine:
    """How programs run here: `mesh` None is one device."""

    run: Execution
    mesh: Mesh | None


def machine(config: MeshConfig, directory: Path, *, draft: Path | None = None) -> Machine:
    """The machine for the target in `directory`, and a draft beside it.

    Raises PipelineError when the mesh does not fit the devices there are.
    """
    if config.hosts or config.coordinator is not None:
        _join_hosts(config.coordinator, config.num_processes, config.process_id)
    heads = [
        checkpoints.read_config(one).get("num_key_value_heads", 1) for one in (directory, draft) if one is not None
    ]
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


@functools.cache  # JAX joins once
def _join_hosts(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except (RuntimeError, ValueError) as error:
        raise PipelineError(
            f"the hosts did not find each other ({error}); start the same command on every host, with "
            "mesh.coordinator, mesh.num_processes and mesh.process_id where the machine does not know them"
        ) from error


def weights_form(config: PipelineConfig, directory: Path, shards: Shards) -> WeightsForm:
    """How the target's weights are held here."""
    packed = is_held_packed(config.target, is_packed(checkpoints.read_config(directory)))
    return WeightsForm(config.target.precision.value, packed, shards)


def is_held_packed(config: TargetConfig, packed_files: bool) -> bool:
    """Whether experts are held as MXFP4: as the files are, unless `target.weights` says otherwise."""
    return packed_files if config.weights is None else config.weights is ExpertWeights.mxfp4


def read_target(config: PipelineConfig, directory: Path, here: Machine) -> tuple[GptOssConfig, GptOssWeights]:
    """The target's weights, each part on the devices that need it."""
    form = weights_form(config, directory, here.run.shards)
    if here.mesh is None:
        return checkpoints.load_target(directory, form)
    model = GptOssConfig.from_hf(checkpoints.read_config(directory))
    placement.require_divisible(model, None, here.run.shards)
    shapes = jax.eval_shape(lambda: gpt_oss_weights.random_weights(model, jax.random.key(0), form))
    return checkpoints.load_target(directory, form, placement.places(shapes, placement.target_specs(shapes), here.mesh))


def read_draft(config: PipelineConfig, directory: Path, here: Machine) -> tuple[DraftConfig, DraftWeights]:
    """The draft's weights in the target's precision, each part on the devices that need it."""
    dtype = config.target.precision.value
    if here.mesh is None:
        return checkpoints.load_draft(directory, dtype)
    sizes = checkpoints.read_draft_config(directory)
    shapes = jax.eval_shape(lambda: draft.random_weights(sizes, jax.random.key(0), dtype))
    return checkpoints.load_draft(directory, dtype, placement.places(shapes, placement.draft_specs(shapes), here.mesh))
