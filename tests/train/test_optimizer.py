"""The optimizer against AdamW's published update, written out in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pipeline.train.optimizer import average_in, optimizer_of, schedule_of
from pipeline.train.recipe import Objective, Recipe

RECIPE = Recipe(
    steps=50,
    batch_sequences=4,
    learning_rate=0.1,
    final_learning_rate=0.01,
    warmup_ratio=0.1,
    beta1=0.8,
    beta2=0.95,
    weight_decay=0.3,
    clip_grad=1.5,
    objective=Objective((0.0, 1.0)),
    checkpoint_steps=10,
    eval_steps=10,
    seed=0,
)
WEIGHTS = {"kernel": np.array([[1.0, -2.0], [0.5, 3.0]]), "norm": np.array([1.0, 2.0])}


def gradients_of(step):
    random = np.random.default_rng(step)
    return {name: random.normal(size=value.shape) for name, value in WEIGHTS.items()}


def adamw(num_steps, recipe=RECIPE):
    """Loshchilov and Hutter, algorithm 2, with clipping before it and no decay on vectors."""
    weights = {name: value.copy() for name, value in WEIGHTS.items()}
    first = {name: np.zeros_like(value) for name, value in weights.items()}
    second = {name: np.zeros_like(value) for name, value in weights.items()}
    history = []
    for step in range(num_steps):
        gradients = gradients_of(step)
        norm = np.sqrt(sum((value**2).sum() for value in gradients.values()))
        scale = min(1.0, recipe.clip_grad / norm)
        rate = rate_at(step, recipe)
        for name, weight in weights.items():
            gradient = gradients[name] * scale
            first[name] = recipe.beta1 * first[name] + (1 - recipe.beta1) * gradient
            second[name] = recipe.beta2 * second[name] + (1 - recipe.beta2) * gradient**2
            unbiased = first[name] / (1 - recipe.beta1 ** (step + 1))
            size = np.sqrt(second[name] / (1 - recipe.beta2 ** (step + 1))) + 1e-8
            decay = recipe.weight_decay * weight if weight.ndim > 1 else 0.0
            weights[name] = weight - rate * (unbiased / size + decay)
        history.append({name: value.copy() for name, value in weights.items()})
    return history


def rate_at(step, recipe):
    warm = round(recipe.warmup_ratio * recipe.steps)
    if step < warm:
        return recipe.learning_rate * step / warm
    done = (step - warm) / (recipe.steps - warm)
    span = recipe.learning_rate - recipe.final_learning_rate
    return recipe.final_learning_rate + span * (1 + np.cos(np.pi * done)) / 2


def trained(num_steps, recipe=RECIPE):
    optimizer = optimizer_of(recipe)
    weights = jax.tree.map(jnp.asarray, WEIGHTS)
    memory = optimizer.init(weights)
    for step in range(num_steps):
        updates, memory = optimizer.update(jax.tree.map(jnp.asarray, gradients_of(step)), memory, weights)
        weights = optax.apply_updates(weights, updates)
    return weights, memory


def test_steps_are_those_of_adamw_with_no_decay_on_vectors():
    found, _ = trained(20)
    for name, wanted in adamw(20)[-1].items():
        np.testing.assert_allclose(found[name], wanted, rtol=1e-5)


def test_the_learning_rate_warms_up_and_ends_where_the_recipe_says():
    rates = [float(schedule_of(RECIPE)(step)) for step in range(RECIPE.steps + 1)]
    np.testing.assert_allclose(rates, [rate_at(step, RECIPE) for step in range(RECIPE.steps + 1)], rtol=1e-5)
    assert (rates[0], max(rates)) == (0.0, pytest.approx(0.1))
    assert rates[-1] == pytest.approx(0.01)


def test_the_average_is_that_of_all_weights_so_far_and_changes_no_step():
    recipe = dataclasses.replace(RECIPE, ema_decay=0.9)
    plain, memory = trained(15)
    assert average_in(memory) is None
    found, memory = trained(15, recipe)
    average = {name: value.copy() for name, value in WEIGHTS.items()}
    for weights in adamw(15):
        average = {name: 0.9 * average[name] + 0.1 * weights[name] for name in average}
    for name in WEIGHTS:
        np.testing.assert_array_equal(found[name], plain[name])
        np.testing.assert_allclose(average_in(memory)[name], average[name], rtol=1e-5)


def test_under_muon_a_kernels_step_has_equal_singular_values_and_vectors_are_adamws():
    recipe = dataclasses.replace(RECIPE, muon=True, weight_decay=0.0, clip_grad=1e9)
    (before, _), (after, _) = trained(7, recipe), trained(8, recipe)
    wanted = adamw(8, recipe)[-1]
    for name, weight in after.items():
        if weight.ndim == 1:
            np.testing.assert_allclose(weight, wanted[name], rtol=1e-5)
            continue
        step = np.asarray(before[name] - weight) / rate_at(7, recipe)
        values = np.linalg.svd(step, compute_uv=False) / (0.2 * max(weight.shape) ** 0.5)
        assert ((values > 0.6) & (values < 1.3)).all(), values  # what five Newton-Schulz steps make of them
