"""How a draft is trained."""

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a draft is trained; `loss_decay` is `blocks.slot_weights`'s, `dtype` that of the arithmetic.

    `dpace_smoothing` and `distillation` as in `loss.draft_sums`, `remat` as in `draft.denoise_blocks`. A batch goes
    through in `accumulation` parts.
    """

    steps: int
    batch_sequences: int
    learning_rate: float
    warmup_ratio: float
    weight_decay: float
    clip_grad: float
    loss_decay: float
    checkpoint_steps: int
    seed: int
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    dpace_smoothing: float | None = None
    distillation: float = 0.0
    accumulation: int = 1
