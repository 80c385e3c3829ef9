"""How a draft is trained; only this module makes it from the configuration."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float32

from pipeline.config.choices import LossWeights, Optimizer
from pipeline.config.schema import TrainConfig
from pipeline.dflash import blocks
from pipeline.model.dflash.config import DFlashConfig


@dataclasses.dataclass(frozen=True)
class Objective:
    """Holds the settings of the loss; hashable, for `jit`.

    `position_weights` has a weight for each block position, position 0 (the anchor) first; with a `dpace_smoothing`
    D-PACE weights positions by what the draft gets right itself. The loss is (1 - `distillation`) times cross entropy
    against the target's tokens plus `distillation` times that against its distribution.
    """

    position_weights: tuple[float, ...]
    dpace_smoothing: float | None = None
    distillation: float = 0.0

    @property
    def weights(self) -> Float32[np.ndarray, " K"]:
        """Returns the position weights [K] as an array."""
        return np.array(self.position_weights, np.float32)


@dataclasses.dataclass(frozen=True)
class DeviceSplit:
    """Divides the devices of a training: `data` copies of the weights, each split over `fsdp` x `tensor` of them.

    Batches are split over `data` and `fsdp`. A number of -1 stands for all devices that the others leave.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Holds how a draft is trained; `dtype` is that of the arithmetic, `remat` as in `dflash.denoise_blocks`.

    A batch is computed in `accumulation` parts. Without `ema_decay` no average of the weights is computed.
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
    checkpoint_steps: int
    eval_steps: int
    seed: int
    objective: Objective
    dtype: DTypeLike = jnp.float32
    muon: bool = False
    remat: bool = False
    accumulation: int = 1
    split: DeviceSplit = DeviceSplit()

    def evaluates_at(self, step: int) -> bool:
        """Returns whether the draft is evaluated after this step (1, 2, ...)."""
        return step % self.eval_steps == 0 or step == self.steps

    def saves_at(self, step: int) -> bool:
        """Returns whether a checkpoint is written after this step: one that is evaluated may turn out the best."""
        return step % self.checkpoint_steps == 0 or self.evaluates_at(step)


def recipe_of(train: TrainConfig, draft: DFlashConfig, seed: int, dtype: jnp.dtype) -> Recipe:
    """Returns the recipe of this configuration; `dtype` is the precision of the arithmetic where it names none."""
    mesh = train.mesh
    sizes = (mesh.data, mesh.fsdp, mesh.tensor)
    decay = train.loss_decay or blocks.default_decay(draft.block_size)
    split = DeviceSplit() if sizes == (None, None, None) else DeviceSplit(*(size or 1 for size in sizes))
    return Recipe(
        steps=train.steps,
        batch_sequences=train.batch_sequences,
        muon=train.optimizer is Optimizer.muon,
        learning_rate=train.learning_rate,
        final_learning_rate=train.final_learning_rate,
        warmup_ratio=train.warmup_ratio,
        beta1=train.beta1,
        beta2=train.beta2,
        weight_decay=train.weight_decay,
        clip_grad=train.clip_grad,
        ema_decay=train.ema_decay,
        checkpoint_steps=train.checkpoint_steps,
        eval_steps=train.eval_steps,
        seed=seed,
        dtype=dtype if train.precision is None else jnp.dtype(train.precision.value),
        remat=train.remat,
        split=split,
        objective=Objective(
            tuple(float(weight) for weight in blocks.position_weights(draft.block_size, decay)),
            train.dpace_smoothing if train.loss_weights is LossWeights.dpace else None,
            train.distillation,
        ),
        accumulation=train.accumulation,
    )
