"""How a program runs: over which shards, and with which kernels."""

import dataclasses
import enum

from pipeline.model.sharding import ALONE, Shards


class Kernels(enum.Enum):
    """What multiplies experts and attends: XLA everywhere, or Pallas kernels on TPU (interpreted: for tests on CPU)."""

    xla = "xla"
    pallas_tpu = "pallas_tpu"
    pallas_interpreted = "pallas_interpreted"


@dataclasses.dataclass(frozen=True)
class Execution:
    """Hashable, for `jit`. Up to `few_tokens` tokens read the experts they hit one by one, more are grouped."""

    shards: Shards = ALONE
    kernels: Kernels = Kernels.xla
    few_tokens: int = 64


PLAIN = Execution()
