"""The evaluation on texts whose rounds are known, for they were written round by round."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny_training
from tiny_training import DRAFT

from pipeline.dflash import blocks
from pipeline.model import draft
from pipeline.teacher_cache import store
from pipeline.train import evaluate as evaluation
from pipeline.train.evaluate import evaluate

LONGEST, DRAFTED = 24, DRAFT.block_size - 1


@jax.jit
def proposed(weights, embedding, head, token_id, features, anchor):
    """The tokens of one block, over features of which those it may not see are gone."""
    seen = jnp.arange(LONGEST) < anchor
    features = jnp.where(seen[:, None], jnp.pad(features, ((0, LONGEST - len(features)), (0, 0))), 0)
    context = draft.context(weights, DRAFT, features[None], jnp.arange(LONGEST)[None])
    ids = blocks.block_token_ids(token_id[None, None], DRAFT.mask_token_id, DRAFT.block_size)
    slots = (anchor + jnp.arange(DRAFT.block_size))[None, None]
    hidden = draft.denoise_blocks(weights, DRAFT, embedding[ids], slots, context, seen[None, None])
    return (hidden[0, 0, 1:] @ head).argmax(-1)


def written_by_rounds(random, propose, num_tokens):
    """A text whose every round keeps a drawn number of the draft's proposals, and these numbers."""
    prompt_tokens = int(random.integers(2, 5))
    token_ids = np.zeros(num_tokens + DRAFT.block_size, np.int32)
    token_ids[: prompt_tokens + 1] = random.integers(0, 36, prompt_tokens + 1)
    features = random.normal(size=(num_tokens, DRAFT.feature_size)).astype(ml_dtypes.bfloat16)
    anchor, rounds = prompt_tokens, []
    while anchor < num_tokens - 1:
        tokens = np.asarray(propose(jnp.asarray(token_ids[anchor]), jnp.asarray(features), anchor))
        kept = int(random.integers(0, DRAFTED + 1))
        token_ids[anchor + 1 : anchor + 1 + kept] = tokens[:kept]
        other = tokens[kept] + 1 if kept < DRAFTED else 0  # behind a whole block anything may come
        token_ids[anchor + 1 + kept] = other % 36
        rounds.append(min(kept, num_tokens - anchor - 2))
        anchor += kept + 1
    return store.CachedSequence(
        token_ids=token_ids[:num_tokens],
        channels=np.full(num_tokens, 3, np.uint8),
        prompt_tokens=prompt_tokens,
        features=features,
    ), rounds


@pytest.mark.parametrize("num_sequences", [None, 2])
def test_rounds_are_those_of_a_decoder(tmp_path, monkeypatch, num_sequences):
    monkeypatch.setattr(evaluation, "BLOCKS_PER_PASS", 7)
    monkeypatch.setattr(evaluation, "SEQUENCES_PER_PASS", 3)
    random = np.random.default_rng(0)
    weights = tiny_training.weights_of(0)
    keys = jax.random.split(jax.random.key(1), 2)
    embedding = jax.random.normal(keys[0], (DRAFT.vocab_size, DRAFT.hidden_size))
    head = jax.random.normal(keys[1], (DRAFT.hidden_size, DRAFT.vocab_size))
    propose = functools.partial(proposed, weights, embedding, head)
    lengths = [17, 6, 21, 5, 12]  # one with a single block, some that fill no pass
    texts = [written_by_rounds(random, propose, length) for length in lengths]
    shards = tiny_training.write_split(tmp_path, "heldout", [sequence for sequence, _ in texts])
    store.write_header(tmp_path, tiny_training.layout_of(DRAFT.feature_size), {"train": 0, "heldout": shards})
    found = evaluate(
        weights, DRAFT, embedding, head, store.open_split(tmp_path, "heldout"), num_sequences=num_sequences
    )
    kept = [count for _, rounds in texts[:num_sequences] for count in rounds]
    assert found.total.histogram == tuple(np.bincount(kept, minlength=DRAFT.block_size))
    assert num_sequences or min(found.total.histogram) > 0
    for told, (sequence, rounds) in zip(found.texts, texts[:num_sequences], strict=True):
        assert told.token_ids == tuple(sequence.token_ids.tolist())
        assert (told.prompt_tokens, told.kept) == (sequence.prompt_tokens, tuple(rounds))
