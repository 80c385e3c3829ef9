"""How a program runs: over which shards, and with which kernels."""

import dataclasses
import enum

from pipeline.model.sharding import ALONE, Shards


class Kernels(enum.Enum):
    """What attends and multiplies experts: XLA everywhere; cuDNN's attention on a GPU; Pallas kernels on a TPU.

    Interpreted, Pallas kernels run on a CPU, for tests.
    """

    xla = "xla"
    cudnn = "cudnn"
    pallas_tpu = "pallas_tpu"
    pallas_interpreted = "pallas_interpreted"


PALLAS = (Kernels.pallas_tpu, Kernels.pallas_interpreted)


@dataclasses.dataclass(frozen=True)
class Execution:
    """Hashable, for `jit`. Up to `few_tokens` tokens read the experts they hit one by one, more are grouped."""

    shards: Shards = ALONE
    kernels: Kernels = Kernels.xla
    few_tokens: int = 64


PLAIN = Execution()
