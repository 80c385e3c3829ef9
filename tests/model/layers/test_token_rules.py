"""Drawn tokens against exact distributions: one step with every rule, two steps with a draft, and a planted bias."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipeline.dflash import acceptance
from pipeline.model.layers import token_rules
from pipeline.model.layers.token_rules import TokenHistory, TokenRules
from pipeline.model.parallel.shards import UNSHARDED

NUM_SAMPLES, VOCABULARY = 25_000, 48
LOGITS = np.random.default_rng(0).normal(size=VOCABULARY) * 1.5
PROMPT, GENERATED = (3, 7, 7, 20), (7, 11, 11, 11, 30)
STOPS = (2, 11)
SUSPICIOUS = 5.0  # deviations of a chi-square; chance gives so much once in a million


def keys_of(seed, count=NUM_SAMPLES):
    return np.random.default_rng(seed).integers(0, 2**32, (count, 2), dtype=np.uint32)


def rules_of(keys, **values):
    """The same rules in every row, with other noise."""
    rules = token_rules.greedy_rules(len(keys))
    changed = {name: jnp.full_like(getattr(rules, name), value) for name, value in values.items()}
    return dataclasses.replace(rules, **{"temperature": jnp.ones(len(keys)), "keys": jnp.asarray(keys), **changed})


def deviations(counts, probabilities):
    """How many standard deviations a chi-square of counts lies above its mean; rare tokens count together."""
    expected = probabilities * counts.sum()
    assert counts[expected == 0].sum() == 0  # what cannot be drawn was not
    rare = expected < 10
    pairs = [*zip(counts[~rare], expected[~rare], strict=True), (counts[rare].sum(), expected[rare].sum())]
    terms = [(found - wanted) ** 2 / wanted for found, wanted in pairs if wanted > 0]
    degrees = len(terms) - 1
    return (sum(terms) - degrees) / np.sqrt(2 * degrees) if degrees else 0.0


def kept(probabilities, min_p, top_k, top_p):
    """The distribution after the three filters, found by sorting."""
    left = np.where(probabilities >= min_p * probabilities.max(), probabilities, 0)
    if top_k:
        left[np.argsort(-left)[top_k:]] = 0
    left /= left.sum()
    order = np.argsort(-left)
    before = np.cumsum(left[order]) - left[order]
    left[order[before >= top_p]] = 0
    return left / left.sum()


def exact(**values):
    """The distribution of a token, computed in float64 for one set of rules; names are those of `CASES`."""
    logits = LOGITS.copy()
    counts = np.bincount(GENERATED, minlength=VOCABULARY)
    seen = list(set(PROMPT) | set(GENERATED))
    repetition = values.get("repetition", 1.0)
    logits[seen] *= np.where(logits > 0, 1 / repetition, repetition)[seen]
    logits -= values.get("frequency", 0) * counts + values.get("presence", 0) * (counts > 0)
    for token, value in values.get("bias", ()):
        logits[token] += value
    if values.get("early"):
        logits[list(STOPS)] = -np.inf
    weights = np.exp((logits - logits.max()) / values.get("temperature", 1.0))
    return kept(weights / weights.sum(), values.get("min_p", 0), values.get("top_k", 0), values.get("top_p", 1.0))


CASES = {
    "nothing": {},
    "cold": {"temperature": 0.4},
    "hot": {"temperature": 1.7},
    "top_p": {"top_p": 0.7},
    "top_k": {"top_k": 9},
    "min_p": {"min_p": 0.08},
    "all filters": {"temperature": 1.3, "min_p": 0.02, "top_k": 20, "top_p": 0.9},
    "repetition": {"repetition": 1.5},
    "frequency": {"frequency": 0.7},
    "presence": {"presence": 1.1},
    "rewarded repetition": {"frequency": -0.6, "presence": -0.3},
    "bias": {"bias": ((5, 2.0), (40, -3.0))},
    "too early for stops": {"early": True},
    "everything": {
        "temperature": 0.8, "top_p": 0.85, "top_k": 30, "min_p": 0.005, "repetition": 1.2, "frequency": 0.2,
        "presence": 0.4, "bias": ((1, 1.5),), "early": True,
    },
}  # fmt: skip


@functools.partial(jax.jit, static_argnames="count")
def counts_of(rules: TokenRules, logits, generated, in_prompt, count):
    history = TokenHistory(*(jnp.broadcast_to(one, (count, VOCABULARY)) for one in (generated, in_prompt)))
    block, start = jnp.zeros((count, 1), jnp.int32), jnp.full(count, 8, jnp.int32)
    rows = jnp.broadcast_to(logits, (count, 1, VOCABULARY))
    tokens = token_rules.choose(rows, rules, history, block, start, UNSHARDED)
    return jnp.zeros(VOCABULARY, jnp.int32).at[tokens[:, 0]].add(1)


def drawn(seed, logits=LOGITS, *, bias=(), early=False, **values):
    rules = rules_of(keys_of(seed), **values)
    ids = [token for token, _ in bias]
    rules = dataclasses.replace(
        rules,
        bias_ids=rules.bias_ids.at[:, : len(ids)].set(jnp.asarray(ids, jnp.int32)),
        biases=rules.biases.at[:, : len(ids)].set(jnp.asarray([value for _, value in bias])),
        stop_ids=rules.stop_ids.at[:, : len(STOPS)].set(jnp.asarray(STOPS)),
        least_length=jnp.full(NUM_SAMPLES, 10 if early else 9),  # the token is for position 9
    )
    generated = jnp.asarray(np.bincount(GENERATED, minlength=VOCABULARY), jnp.int32)
    in_prompt = jnp.asarray(np.bincount(PROMPT, minlength=VOCABULARY) > 0)
    return np.asarray(counts_of(rules, jnp.asarray(logits, jnp.float32), generated, in_prompt, NUM_SAMPLES))


@pytest.mark.parametrize("values", CASES.values(), ids=CASES.keys())
def test_tokens_are_drawn_as_often_as_the_exact_distribution_says(values):
    assert deviations(drawn(1, **values), exact(**values)) < SUSPICIOUS


@pytest.mark.parametrize("values", [CASES["nothing"], CASES["everything"]], ids=["nothing", "everything"])
def test_a_planted_bias_of_two_percent_is_found(values):
    probabilities = exact(**values)
    token = int(np.argsort(-probabilities)[2])
    biased = 0.98 * probabilities
    biased[token] += 0.02
    counts = np.random.default_rng(0).multinomial(NUM_SAMPLES, biased)
    assert deviations(counts, probabilities) > SUSPICIOUS


def chosen(logits, rules, start):
    """Tokens behind positions from `start` on, with no history."""
    count, length, size = logits.shape
    history = TokenHistory(jnp.zeros((count, size), jnp.int32), jnp.zeros((count, size), bool))
    return token_rules.choose(logits, rules, history, jnp.zeros((count, length), jnp.int32), start, UNSHARDED)


def test_other_positions_and_other_keys_are_independent():
    """Tokens of two positions, and of two keys, are drawn together as often as chance brings them together."""
    keys = keys_of(2)
    rows = jnp.broadcast_to(jnp.asarray(LOGITS[:6], jnp.float32), (NUM_SAMPLES, 2, 6))
    tokens = np.asarray(chosen(rows, rules_of(keys), jnp.full(NUM_SAMPLES, 3, jnp.int32)))
    one = np.exp(LOGITS[:6] - LOGITS[:6].max())
    pair = np.outer(one, one).ravel() / one.sum() ** 2
    assert deviations(np.bincount(tokens[:, 0] * 6 + tokens[:, 1], minlength=36), pair) < SUSPICIOUS
    assert deviations(np.bincount(tokens[:-1, 0] * 6 + tokens[1:, 0], minlength=36), pair) < SUSPICIOUS


SMALL = 5
FIRST = np.random.default_rng(3).normal(size=SMALL)
SECOND = np.random.default_rng(4).normal(size=(SMALL, SMALL)) * 1.5  # by the first token
PENALTY = 0.9


def two_steps(keys, temperature):
    """The first two tokens that rounds of a draft and a target yield, and how often the first was accepted."""
    count = len(keys)
    rules = rules_of(keys, temperature=temperature, frequency=PENALTY)
    start, anchor = jnp.zeros(count, jnp.int32), jnp.full(count, 2, jnp.int32)
    history = TokenHistory(jnp.zeros((count, SMALL), jnp.int32).at[:, 2].set(1), jnp.zeros((count, SMALL), bool))
    first, second = jnp.asarray(FIRST, jnp.float32), jnp.asarray(SECOND, jnp.float32)

    # a draft proposes whatever it likes; it does not know the noise
    proposed = jnp.asarray(np.random.default_rng(5).choice(SMALL, (count, 1), p=[0.5, 0.2, 0.1, 0.1, 0.1]), jnp.int32)
    block = jnp.concatenate([anchor[:, None], proposed[:, :1]], axis=1)
    logits = jnp.stack([jnp.broadcast_to(first, (count, SMALL)), second[proposed[:, 0]]], axis=1)
    chosen = token_rules.choose(logits, rules, history, block, start, UNSHARDED)
    accepted = acceptance.count_accepted(proposed[:, :1], chosen[:, :1]) > 0
    # where the proposal was rejected, the next round has the target's token as its anchor
    after = token_rules.with_tokens(history, rules, chosen[:, :1], jnp.ones(count, jnp.int32), UNSHARDED)
    again = second[chosen[:, 0]][:, None]
    next_round = token_rules.choose(again, rules, after, chosen[:, :1], start + 1, UNSHARDED)[:, 0]
    return chosen[:, 0], jnp.where(accepted, chosen[:, 1], next_round), accepted.mean()


def exact_pairs(temperature):
    def softmax(logits):
        weights = np.exp((logits - logits.max()) / temperature)
        return weights / weights.sum()

    pairs = np.zeros((SMALL, SMALL))
    anchor = np.eye(SMALL)[2]
    for token, probability in enumerate(softmax(FIRST - PENALTY * anchor)):
        pairs[token] = probability * softmax(SECOND[token] - PENALTY * (anchor + np.eye(SMALL)[token]))
    return pairs.ravel()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.6])
def test_two_steps_with_a_draft_have_the_targets_joint_distribution(temperature):
    first, second, accepted = jax.jit(two_steps, static_argnames="temperature")(keys_of(6, 200_000), temperature)
    counts = np.bincount(np.asarray(first) * SMALL + np.asarray(second), minlength=SMALL**2)
    assert 0.1 < accepted < 0.9  # both ways happen
    assert deviations(counts, exact_pairs(temperature)) < SUSPICIOUS
    biased = 0.98 * exact_pairs(temperature)
    biased[7] += 0.02
    assert deviations(np.random.default_rng(0).multinomial(200_000, biased), exact_pairs(temperature)) > SUSPICIOUS


def test_a_temperature_of_zero_is_the_most_likely_token_beside_any_other_rows():
    keys = keys_of(7, 6)
    rules = dataclasses.replace(rules_of(keys), temperature=jnp.asarray([0.0, 1.0, 0.0, 2.0, 0.0, 1.0]))
    logits = jnp.asarray(np.random.default_rng(8).normal(size=(6, 3, VOCABULARY)), jnp.float32)
    tokens = chosen(logits, rules, jnp.arange(6))
    assert (np.asarray(tokens)[::2] == np.asarray(logits).argmax(-1)[::2]).all()
    assert (np.asarray(tokens)[1::2] != np.asarray(logits).argmax(-1)[1::2]).any()
