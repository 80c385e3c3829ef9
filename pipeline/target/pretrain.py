"""Trains a model of the GPT-OSS architecture from scratch: loss, optimizer and the jitted step."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from pipeline.model.gpt_oss import forward as gpt_oss
from pipeline.model.gpt_oss.config import GptOssConfig
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.gpt_oss.weights import GptOssWeights, random_weights
from pipeline.model.layers.pytree import pytree_dataclass
from pipeline.muon import scale_by_muon
from pipeline.target.batches import TokenBatch

WARM_UP = 0.03  # share of the steps
FINAL_RATE = 0.02  # share of the peak learning rate
MUON_SIDE = 16  # rows and columns that a matrix has at least


@pytree_dataclass()
class TrainingState:
    """Holds what a checkpoint stores."""

    step: Int[Array, ""]
    weights: GptOssWeights
    optimizer: Any


def pretrain_optimizer(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """Returns Muon for the layers' matrices and Adam for the rest, with warm-up, cosine decay and clipping to norm 1.

    Embedding and head are Adam's, as Muon wants it, and so are routers and the experts' biases, which have few rows.
    Weights decay, vectors do not.
    """
    rate = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, max(1, int(WARM_UP * steps)), steps, FINAL_RATE * learning_rate
    )
    decayed = partial(jax.tree.map, lambda array: array.ndim > 1)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.partition({True: scale_by_muon(), False: optax.scale_by_adam(b2=0.95)}, _is_muons),
        optax.add_decayed_weights(0.05, mask=decayed),
        optax.scale_by_learning_rate(rate),
    )


def _is_muons(weights: GptOssWeights) -> GptOssWeights:
    """Returns a tree of the weights' structure: whether Muon has the array."""
    layers = jax.tree.map(lambda array: array.ndim == 2 and min(array.shape) >= MUON_SIDE, weights.layers)
    return dataclasses.replace(jax.tree.map(lambda _: False, weights), layers=layers)


def start(config: GptOssConfig, optimizer: optax.GradientTransformation, key: Array) -> TrainingState:
    """Returns the state at step 0, with random weights."""
    weights = random_weights(config, key)
    return TrainingState(jnp.zeros((), jnp.int32), weights, optimizer.init(weights))


def next_token_loss(
    weights: GptOssWeights, config: GptOssConfig, token_ids: Int[Array, "B T"], generated: Bool[Array, "B T"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the mean cross-entropy of the assistant's tokens in nats, and the accuracy of greedy decoding."""
    start = jnp.zeros(token_ids.shape[0], jnp.int32)
    hidden = gpt_oss.forward(TargetModel(config, weights), token_ids, start, None).hidden
    logits = gpt_oss.logits(weights, hidden[:, :-1])
    labels, counts = token_ids[:, 1:], generated[:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    total = jnp.maximum(counts.sum(), 1)
    correct = (logits.argmax(-1) == labels) & counts
    return (losses * counts).sum() / total, correct.sum() / total


def step_of(
    config: GptOssConfig, optimizer: optax.GradientTransformation
) -> Callable[[TrainingState, TokenBatch], tuple[TrainingState, dict[str, Array]]]:
    """Returns the jitted training step; it donates its state."""

    @partial(jax.jit, donate_argnums=0)
    def step(state: TrainingState, token_ids: Array, generated: Array) -> tuple[TrainingState, dict[str, Array]]:
        gradient = jax.value_and_grad(next_token_loss, has_aux=True)
        (loss, accuracy), gradients = gradient(state.weights, config, token_ids, generated)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.weights)
        weights = optax.apply_updates(state.weights, updates)
        return TrainingState(state.step + 1, weights, optimizer_state), {"loss": loss, "accuracy": accuracy}

    return lambda state, batch: step(state, batch.token_ids, batch.generated)


def accuracy_on(weights: GptOssWeights, config: GptOssConfig, batch: TokenBatch) -> float:
    """Returns the share of a batch's assistant tokens that are predicted correctly."""
    measure = jax.jit(next_token_loss, static_argnums=1)
    return float(measure(weights, config, batch.token_ids, batch.generated)[1])
