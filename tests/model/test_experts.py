"""The three ways to run the experts, against each other and against a loop in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipeline.model import experts
from pipeline.model.experts import ExpertsWeights

LIMIT = 2.0  # low, so that both clamps are at work


@pytest.fixture(params=[(7, 2), (9, 4)], ids=["7 experts, 2 a token", "9 experts, 4 a token"])
def layer(request):
    num_experts, per_token = request.param
    shapes = [(10, num_experts), (num_experts,), (num_experts, 10, 2, 6), (num_experts, 2, 6)]
    shapes += [(num_experts, 6, 10), (num_experts, 10)]
    random = np.random.default_rng(0)
    return ExpertsWeights(*[jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes]), per_token


def _loop(inputs, weights, per_token):
    """One token and one expert at a time, from the formulas of the model card."""
    outputs = np.zeros_like(inputs)
    for row, token in enumerate(inputs):
        logits = token @ np.asarray(weights.router) + np.asarray(weights.router_bias)
        chosen = np.argsort(-logits, kind="stable")[:per_token]
        share = np.exp(logits[chosen] - logits[chosen].max())
        for expert, weight in zip(chosen, share / share.sum(), strict=True):
            gate, up = np.einsum("d,dpf->pf", token, weights.gate_up[expert]) + np.asarray(weights.gate_up_bias[expert])
            gate, up = np.minimum(gate, LIMIT), np.clip(up, -LIMIT, LIMIT)
            hidden = (up + 1) * gate / (1 + np.exp(-1.702 * gate))
            outputs[row] += weight * (hidden @ np.asarray(weights.down[expert]) + np.asarray(weights.down_bias[expert]))
    return outputs


@pytest.mark.parametrize("run", [experts.gathered, experts.dense, experts.grouped])
def test_every_way_equals_a_loop_over_tokens_and_experts(layer, run):
    weights, per_token = layer
    inputs = np.random.default_rng(1).normal(size=(23, 10)).astype(np.float32)
    shares, indices = experts.route(jnp.asarray(inputs), weights, per_token)
    outputs = jax.jit(run, static_argnums=4)(jnp.asarray(inputs), weights, shares, indices, LIMIT)
    np.testing.assert_allclose(outputs, _loop(inputs, weights, per_token), rtol=0, atol=1e-4)


def test_the_mixture_is_the_same_for_few_and_for_many_tokens(layer):
    weights, per_token = layer
    inputs = np.random.default_rng(2).normal(size=(40, 10)).astype(np.float32)
    together = experts.mixture(jnp.asarray(inputs), weights, per_token, LIMIT)
    alone = [experts.mixture(jnp.asarray(inputs[i : i + 1]), weights, per_token, LIMIT) for i in range(len(inputs))]
    np.testing.assert_allclose(together, np.concatenate(alone), rtol=0, atol=1e-4)
