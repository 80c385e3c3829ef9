"""How a program runs: over which shards, and with which kernel backend."""

import dataclasses
import enum

from pipeline.model.parallel.shards import UNSHARDED, Shards


class KernelBackend(enum.Enum):
    """Names what computes attention and experts: XLA everywhere, cuDNN's attention on a GPU, Pallas kernels on a TPU.

    Interpreted Pallas kernels run on a CPU, for tests.
    """

    xla = "xla"
    cudnn = "cudnn"
    pallas_tpu = "pallas_tpu"
    pallas_interpreted = "pallas_interpreted"


PALLAS_BACKENDS = (KernelBackend.pallas_tpu, KernelBackend.pallas_interpreted)


@dataclasses.dataclass(frozen=True)
class Execution:
    """Holds how a program runs; hashable, for `jit`.

    Up to `max_per_expert_tokens` tokens go through the experts that they hit one by one; more are grouped by expert.
    """

    shards: Shards = UNSHARDED
    backend: KernelBackend = KernelBackend.xla
    max_per_expert_tokens: int = 64


DEFAULT_EXECUTION = Execution()
