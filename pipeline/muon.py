"""Muon, the optimizer of matrices that both the target's and the draft's training use."""

from typing import Any

import jax
import optax
import optax.contrib
from jaxtyping import Array

RMS = 0.2  # of Adam's steps


def scale_by_muon() -> optax.GradientTransformation:
    """Returns Muon for a tree of matrices, its steps scaled to the size that Adam's have.

    So one learning rate suits both. Source of the scale: `adjust_lr_fn="match_rms_adamw"` of torch.optim.Muon; arXiv
    2502.16982.
    """

    def axes(matrices: Any) -> Any:
        return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(), matrices)

    def scale(update: Array, _weight: Array | None) -> Array:
        # optax's `scale_by_shape` computes the factor in float32, which changes its last bit for some shapes
        return update * (RMS * max(update.shape) ** 0.5)

    return optax.chain(optax.contrib.scale_by_muon(weight_dimension_numbers=axes), optax.stateless_with_tree_map(scale))
