"""Training a GPT-OSS-architecture model from scratch: loss, optimizer and one jitted step."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from pipeline.model import gpt_oss
from pipeline.model.gpt_oss_config import GptOssConfig
from pipeline.model.gpt_oss_weights import GptOssWeights, random_weights
from pipeline.target.batches import Batch

WARM_UP = 0.05  # share of the steps
FINAL_RATE = 0.05  # share of the peak learning rate


@no_type_check  # JAX rebuilds it around shapes, masks and gradients too
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Training:
    """What a checkpoint holds."""

    step: Int[Array, ""]
    weights: GptOssWeights
    optimizer: Any


def optimizer_of(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """AdamW with warm-up and cosine decay, gradients clipped to norm 1; no decay on vectors."""
    rate = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, max(1, int(WARM_UP * steps)), steps, FINAL_RATE * learning_rate
    )
    decayed = partial(jax.tree.map, lambda array: array.ndim > 1)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.95, weight_decay=0.05, mask=decayed))


def start(config: GptOssConfig, optimizer: optax.GradientTransformation, key: Array) -> Training:
    """Random weights at step 0."""
    weights = random_weights(config, key)
    return Training(jnp.zeros((), jnp.int32), weights, optimizer.init(weights))


def next_token_loss(
    weights: GptOssWeights, config: GptOssConfig, token_ids: Int[Array, "B T"], generated: Bool[Array, "B T"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean cross-entropy of the assistant's tokens, and the share that greedy decoding would get right."""
    start = jnp.zeros(token_ids.shape[0], jnp.int32)
    hidden = gpt_oss.forward(weights, config, token_ids, start, None).hidden
    logits = gpt_oss.logits(weights, hidden[:, :-1])
    labels, counts = token_ids[:, 1:], generated[:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    total = jnp.maximum(counts.sum(), 1)
    right = (logits.argmax(-1) == labels) & counts
    return (losses * counts).sum() / total, right.sum() / total


def step_of(
    config: GptOssConfig, optimizer: optax.GradientTransformation
) -> Callable[[Training, Batch], tuple[Training, dict[str, Array]]]:
    """The jitted training step; its state is donated."""

    @partial(jax.jit, donate_argnums=0)
    def step(state: Training, token_ids: Array, generated: Array) -> tuple[Training, dict[str, Array]]:
        gradient = jax.value_and_grad(next_token_loss, has_aux=True)
        (loss, accuracy), gradients = gradient(state.weights, config, token_ids, generated)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.weights)
        weights = optax.apply_updates(state.weights, updates)
        return Training(state.step + 1, weights, optimizer_state), {"loss": loss, "accuracy": accuracy}

    return lambda state, batch: step(state, batch.token_ids, batch.generated)


def accuracy_on(weights: GptOssWeights, config: GptOssConfig, batch: Batch) -> float:
    """Share of a batch's assistant tokens predicted right."""
    measure = jax.jit(next_token_loss, static_argnums=1)
    return float(measure(weights, config, batch.token_ids, batch.generated)[1])
