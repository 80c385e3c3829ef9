"""AdamW or Muon for drafts: no decay of norms and biases, cosine schedule with warm-up, a weight average if wanted."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from pipeline.muon import scale_by_muon
from pipeline.train.recipe import Recipe


class Averaged(NamedTuple):
    """The optimizer's state of an exponential moving average of the weights."""

    average: Any


def optimizer_of(recipe: Recipe) -> optax.GradientTransformation:
    """Returns the optimizer: clipping by the global norm, a step by the schedule, decay of matrices alone, the average.

    The average changes no step. Steps are Adam's, or with `muon` Muon's for matrices.
    """
    adam = optax.scale_by_adam(recipe.beta1, recipe.beta2)
    steps = [
        optax.clip_by_global_norm(recipe.clip_grad),
        optax.partition({True: scale_by_muon(), False: adam}, _is_matrix) if recipe.muon else adam,
        optax.add_decayed_weights(recipe.weight_decay, mask=_is_matrix),
        optax.scale_by_learning_rate(schedule_of(recipe)),
    ]
    return optax.chain(*steps, *([] if recipe.ema_decay is None else [averaged(recipe.ema_decay)]))


def schedule_of(recipe: Recipe) -> Callable[[Array], Array]:
    """Returns the learning rate by step (0, 1, ...): linear to its peak, then half a cosine to the final one."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=recipe.learning_rate,
        warmup_steps=round(recipe.warmup_ratio * recipe.steps),
        decay_steps=recipe.steps,
        end_value=recipe.final_learning_rate,
    )


def averaged(decay: float) -> optax.GradientTransformation:
    """Returns a transformation that averages: decay * average + (1 - decay) * weights, from the first weights on."""

    def init(weights: Any) -> Averaged:
        return Averaged(jax.tree.map(jnp.copy, weights))  # the step donates both weights and optimizer state

    def update(updates: Any, state: Averaged, weights: Any) -> tuple[Any, Averaged]:
        return updates, Averaged(
            jax.tree.map(
                lambda average, weight, change: decay * average + (1 - decay) * (weight + change),
                state.average,
                weights,
                updates,
            )
        )

    return optax.GradientTransformation(init, update)


def average_in(state: Any) -> Any | None:
    """Returns the averaged weights in the optimizer's state, in the shape of the weights; None without an average."""
    found = [one.average for one in state if isinstance(one, Averaged)]
    return found[0] if found else None


def _is_matrix(weights: Any) -> Any:
    return jax.tree.map(lambda weight: weight.ndim > 1, weights)
