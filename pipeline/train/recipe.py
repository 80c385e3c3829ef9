"""How a draft is trained."""

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True)
class Split:
    """The devices of a training: `data` copies of the weights, each split over `fsdp` x `tensor` of them.

    Batches are split over `data` and `fsdp`. A number of -1 stands for all devices that the others leave.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a draft is trained; `loss_decay` is `blocks.slot_weights`'s, `dtype` that of the arithmetic.

    `dpace_smoothing` and `distillation` as in `loss.draft_sums`, `remat` as in `draft.denoise_blocks`. A batch goes
    through in `accumulation` parts. Without `ema_decay` no average of the weights is kept.
    """

    steps: int
    batch_sequences: int
    learning_rate: float
    final_learning_rate: float = 0.0
    warmup_ratio: float
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float
    clip_grad: float
    ema_decay: float | None = None
    loss_decay: float
    checkpoint_steps: int
    eval_steps: int
    seed: int
    dtype: DTypeLike = jnp.float32
    muon: bool = False
    remat: bool = False
    dpace_smoothing: float | None = None
    distillation: float = 0.0
    accumulation: int = 1
    split: Split = Split()

    def evaluates_at(self, step: int) -> bool:
        """Whether the draft is evaluated behind this step (1, 2, ...)."""
        return step % self.eval_steps == 0 or step == self.steps

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint is written behind this step: one that is evaluated may turn out the best."""
        return step % self.checkpoint_steps == 0 or self.evaluates_at(step)
