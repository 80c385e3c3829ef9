"""What programs run with: devices, mesh and kernel backend."""

import dataclasses

from jax.sharding import Mesh

from pipeline.model.parallel.execution import DEFAULT_EXECUTION, Execution


@dataclasses.dataclass(frozen=True)
class Runtime:
    """Holds what programs run with; `mesh` None is one device."""

    execution: Execution = DEFAULT_EXECUTION
    mesh: Mesh | None = None


SINGLE_DEVICE = Runtime()
