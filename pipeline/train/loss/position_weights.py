"""D-PACE: weights of drafted positions that the draft's own probabilities decide."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def dpace(
    text: Float[Array, "*blocks drafted"], counts: Bool[Array, "*blocks drafted"], smoothing: float
) -> Float[Array, "*blocks drafted"]:
    """Returns weights of positions by the cross entropy `text` of their tokens; zero for those that do not count.

    A position's token is smoothed to be right with probability (1 - smoothing) * exp(-text) + smoothing; the product up
    to a position estimates how likely a round reaches it, and a position's weight is the sum of those products from
    itself on. No gradient flows through weights.
    Source: SpecForge 0.2.0, algorithms/common/dflash_family_model.py, `_dpace_weight` ("dpace"); arXiv 2605.18810.
    """
    right = (1 - smoothing) * jnp.exp(-jax.lax.stop_gradient(text)) + smoothing
    reached = jnp.cumprod(jnp.where(counts, right, 1.0), axis=-1) * counts
    return jnp.flip(jnp.cumsum(jnp.flip(reached, -1), axis=-1), -1) * counts
