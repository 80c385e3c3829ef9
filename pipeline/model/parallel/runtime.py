"""What programs run with: the execution plan and the mesh."""

import dataclasses

from jax.sharding import Mesh

from pipeline.model.parallel.execution import DEFAULT_EXECUTION, Execution


@dataclasses.dataclass(frozen=True)
class Runtime:
    """How programs run; `mesh` None is one device."""

    execution: Execution = DEFAULT_EXECUTION
    mesh: Mesh | None = None


SINGLE_DEVICE = Runtime()
