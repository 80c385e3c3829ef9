"""Finds TPU slices that need not be there: libtpu compiles for a slice by its name alone."""

import dataclasses
import os
from typing import Any

from jax.experimental import topologies

from pipeline.cost.chips import CHIPS, Chip
from pipeline.errors import PipelineError

TPUS = ("v5e", "v5p", "v6e")

# otherwise libtpu asks a cloud's metadata server for the machine, logs errors, and bars other processes from compiling
WITHOUT_TPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Holds a slice: its chip, and its devices as JAX describes them."""

    name: str
    chip: Chip
    devices: list[Any]


def slice_of(topology: str) -> Slice:
    """Returns the slice of a name such as `v6e:2x4`; raises PipelineError when libtpu is missing or knows none."""
    kind = topology.partition(":")[0]
    if kind not in TPUS:
        raise PipelineError(
            f"compile.topology is {topology}; it must be one of {', '.join(TPUS)} and a size, as in v6e:2x4"
        )
    for name, value in WITHOUT_TPU.items():
        os.environ.setdefault(name, value)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        if "not installed" in reason:
            raise PipelineError(
                "stage=compile needs the libtpu of this version of JAX, which compiles on any machine; install it: "
                "pip install -e '.[tpu]'"
            ) from error
        raise PipelineError(f"compile.topology is {topology}; libtpu has no such slice ({reason})") from error
    return Slice(topology, CHIPS[kind], list(found.devices))
