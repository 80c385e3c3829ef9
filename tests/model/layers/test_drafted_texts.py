"""Short texts written in rounds, with every rule and every proposal, against exact enumeration of all texts."""

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipeline.dflash import acceptance
from pipeline.model.layers import token_rules
from pipeline.model.layers.token_rules import TokenHistory, TokenRules
from pipeline.model.parallel.shards import UNSHARDED
from tests.support.chi_square import SUSPICIOUS, deviations

SIZE, LENGTH, WIDTH = 4, 3, 3  # tokens there are, of a text, of a block
STOP, ANCHOR, PROMPT = 3, 2, (1, 2)
START = 5  # the anchor's position
LOGITS = np.random.default_rng(3).normal(size=(SIZE, SIZE)) * 1.2  # by the token before
PROPOSALS = list(itertools.product(range(SIZE), repeat=WIDTH - 1))
NUM_TEXTS = 200_000

RULES = {
    "nothing": {},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 1.8},
    "top_p": {"top_p": 0.9},
    "top_k": {"top_k": 2},
    "min_p": {"min_p": 0.15},
    "frequency": {"frequency": 0.9},
    "presence": {"presence": 1.5},
    "repetition": {"repetition": 1.8},
    "rewarded": {"frequency": -0.7, "presence": -0.3},
    "bias": {"bias": {0: 1.1, STOP: -0.8}},
    "no stop before the second": {"min_tokens": 1},
    "no stop before the end": {"min_tokens": LENGTH},
    "everything": {
        "temperature": 0.8, "top_p": 0.97, "top_k": 3, "min_p": 0.01, "frequency": 0.3, "presence": 0.4,
        "repetition": 1.2, "bias": {1: 0.5}, "min_tokens": 1,
    },
}  # fmt: skip


def next_probabilities(text, values):
    """The exact distribution of the token behind a text that begins with the anchor."""
    logits = LOGITS[text[-1]].copy()
    repetition, frequency, presence = (
        values.get(name, default) for name, default in (("repetition", 1), ("frequency", 0), ("presence", 0))
    )
    for token in range(SIZE):
        if token in (*PROMPT, *text):
            logits[token] = logits[token] / repetition if logits[token] > 0 else logits[token] * repetition
        logits[token] -= frequency * text.count(token) + presence * (token in text)
        logits[token] += values.get("bias", {}).get(token, 0)
    if len(text) - 1 < values.get("min_tokens", 0):
        logits[STOP] = -math.inf
    weights = np.exp((logits - logits.max()) / values.get("temperature", 1))
    weights[weights < values.get("min_p", 0) * weights.max()] = 0
    order = np.argsort(-weights)
    if values.get("top_k"):
        weights[order[values["top_k"] :]] = 0
    shares = weights / weights.sum()
    before = np.cumsum(shares[order]) - shares[order]
    weights[order[before >= values.get("top_p", 1)]] = 0
    return weights / weights.sum()


def exact_texts(values, greedy_share=0.0):
    """The probability of every text, by its number in base SIZE + 1; a text ends behind the stop token.

    A share of the tokens may be the likeliest ones instead of drawn ones, which is a fault.
    """
    found = np.zeros((SIZE + 1) ** LENGTH)

    def add(text, probability):
        if len(text) == LENGTH + 1 or text[1:].count(STOP):
            found[number_of(text[1:])] += probability
        else:
            shares = (1 - greedy_share) * next_probabilities(text, values)
            shares[shares.argmax()] += greedy_share
            for token, share in enumerate(shares):
                if share:
                    add([*text, token], probability * share)

    add([ANCHOR], 1.0)
    return found


def number_of(text):
    padded = [token + 1 for token in text] + [0] * (LENGTH - len(text))
    return sum(token * (SIZE + 1) ** index for index, token in enumerate(padded))


def rules_of(keys, values):
    numbers = {name: value for name, value in values.items() if name not in ("bias", "min_tokens")}
    bias, count = values.get("bias", {}), len(keys)
    spare = SIZE - len(bias)
    rules = {
        name: jnp.broadcast_to(value, (count, *value.shape[1:]))
        for name, value in vars(token_rules.greedy_rules(1)).items()
    }
    rules |= {name: jnp.full_like(rules[name], value) for name, value in ({"temperature": 1} | numbers).items()}
    rules |= {
        "keys": jnp.asarray(keys),
        "stop_ids": jnp.full((count, 1), STOP),
        "least_length": jnp.full(count, START + 1 + values["min_tokens"] if "min_tokens" in values else 0),
        "bias_ids": jnp.broadcast_to(jnp.asarray([*bias, *[token_rules.NO_TOKEN] * spare], jnp.int32), (count, SIZE)),
        "biases": jnp.broadcast_to(jnp.asarray([*bias.values(), *[0] * spare], jnp.float32), (count, SIZE)),
    }
    return TokenRules(**rules)


def keys_of(seed, count):
    return np.random.default_rng(seed).integers(0, 2**32, (count, 2), dtype=np.uint32)


def texts_of(rules, proposals, *, width, wrongly_accepted=0.0, forgets_the_block=False):
    """The numbers of texts that rounds of `width` write, and how many proposed tokens were accepted.

    `proposals` [rounds, texts, WIDTH - 1] are what a draft proposes in each round. Two faults can be planted: a share
    of wrong proposals is accepted, or penalties do not count the tokens of the block.
    """
    count = proposals.shape[1]
    in_prompt = jnp.zeros((count, SIZE), bool).at[:, jnp.asarray(PROMPT)].set(True)
    text = Text(
        tokens=jnp.zeros((count, LENGTH + WIDTH), jnp.int32),
        anchor=jnp.full(count, ANCHOR, jnp.int32),
        start=jnp.full(count, START, jnp.int32),
        done=jnp.zeros(count, bool),
        history=TokenHistory(jnp.zeros((count, SIZE), jnp.int32).at[:, ANCHOR].set(1), in_prompt),
    )
    accepted = 0
    for index in range(LENGTH):
        proposed = proposals[index, :, : width - 1]
        lucky = jax.random.uniform(jax.random.key(index), proposed.shape) < wrongly_accepted
        text, num_accepted = one_round(text, rules, proposed, lucky, forgets_the_block)
        accepted += int(num_accepted)
    return text.tokens[:, :LENGTH] @ (SIZE + 1) ** jnp.arange(LENGTH), accepted


class Text(NamedTuple):
    """Texts so far, one more than each token, behind the anchors at START."""

    tokens: jax.Array
    anchor: jax.Array
    start: jax.Array
    done: jax.Array
    history: TokenHistory


@jax.jit
def one_round(text, rules, proposed, lucky, forgets_the_block):
    block = jnp.concatenate([text.anchor[:, None], proposed], axis=1)
    seen = jnp.where(forgets_the_block, -1, block)
    logits = jnp.asarray(LOGITS, jnp.float32)[block]
    chosen = token_rules.choose(logits, rules, text.history, seen, text.start, UNSHARDED)
    chosen = chosen.at[:, :-1].set(jnp.where(lucky, proposed, chosen[:, :-1]))
    yields = acceptance.count_accepted(proposed, chosen[:, :-1]) + 1
    room = START + LENGTH - text.start
    yields, stopped = acceptance.cut_at_stop(chosen, jnp.minimum(yields, room), rules.stop_ids)
    yields = jnp.where(text.done, 0, yields)
    columns = jnp.arange(block.shape[1])
    new = jnp.where(columns < yields[:, None], chosen + 1, 0)
    at = (text.start - START)[:, None] + columns
    last = jnp.take_along_axis(chosen, jnp.maximum(yields - 1, 0)[:, None], axis=1)[:, 0]
    after = Text(
        tokens=text.tokens.at[jnp.arange(len(block))[:, None], at].add(new, mode="drop"),
        anchor=jnp.where(yields > 0, last, text.anchor),
        start=text.start + yields,
        done=text.done | stopped | (yields >= room),
        history=token_rules.with_tokens(text.history, rules, chosen, yields, UNSHARDED),
    )
    return after, jnp.maximum(yields - 1, 0).sum()


def all_proposals(num_texts):
    """In the first round every proposal in turn, and then any."""
    first = np.array(PROPOSALS)[np.arange(num_texts) % len(PROPOSALS)]
    rest = np.random.default_rng(1).integers(0, SIZE, (LENGTH - 1, num_texts, WIDTH - 1))
    return jnp.asarray(np.concatenate([first[None], rest]), jnp.int32)


def counts_of(numbers):
    return np.bincount(np.asarray(numbers), minlength=(SIZE + 1) ** LENGTH)


@pytest.mark.parametrize("values", RULES.values(), ids=RULES.keys())
def test_texts_written_with_a_draft_are_as_frequent_as_enumeration_says(values):
    numbers, accepted = texts_of(rules_of(keys_of(0, NUM_TEXTS), values), all_proposals(NUM_TEXTS), width=WIDTH)
    assert accepted > NUM_TEXTS / 10
    assert deviations(counts_of(numbers), exact_texts(values)) < SUSPICIOUS


@pytest.mark.parametrize("values", RULES.values(), ids=RULES.keys())
def test_no_proposal_changes_a_text(values):
    """Whatever is proposed, and in blocks of every size, each key writes the text that it writes alone."""
    keys = np.repeat(keys_of(1, 1000), len(PROPOSALS), axis=0)
    rules, proposals = rules_of(keys, values), all_proposals(len(keys))
    alone, _ = texts_of(rules, proposals, width=1)
    for width in (2, 3):
        numbers, accepted = texts_of(rules, proposals, width=width)
        assert accepted > len(keys) / 10
        assert (np.asarray(numbers) == np.asarray(alone)).all()


@pytest.mark.parametrize("values", RULES.values(), ids=RULES.keys())
def test_two_percent_of_tokens_that_are_not_drawn_are_found(values):
    draws = np.random.default_rng(2).multinomial(NUM_TEXTS, exact_texts(values))
    assert deviations(draws, exact_texts(values)) < SUSPICIOUS
    faulty = np.random.default_rng(2).multinomial(NUM_TEXTS, exact_texts(values, greedy_share=0.02))
    assert deviations(faulty, exact_texts(values)) > SUSPICIOUS


@pytest.mark.parametrize("name", ["nothing", "cold", "frequency", "everything"])
def test_two_percent_of_wrongly_accepted_proposals_are_found(name):
    rules, proposals = rules_of(keys_of(0, NUM_TEXTS), RULES[name]), all_proposals(NUM_TEXTS)
    numbers, _ = texts_of(rules, proposals, width=WIDTH, wrongly_accepted=0.02)
    assert deviations(counts_of(numbers), exact_texts(RULES[name])) > SUSPICIOUS


@pytest.mark.parametrize("name", ["frequency", "presence", "repetition", "rewarded"])
def test_penalties_that_forget_the_tokens_of_the_block_are_found(name):
    rules, proposals = rules_of(keys_of(0, NUM_TEXTS), RULES[name]), all_proposals(NUM_TEXTS)
    numbers, _ = texts_of(rules, proposals, width=WIDTH, forgets_the_block=True)
    assert deviations(counts_of(numbers), exact_texts(RULES[name])) > SUSPICIOUS
