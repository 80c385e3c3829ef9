"""The evaluation on texts whose rounds are known, for they were written round by round."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pipeline.dflash import blocks
from pipeline.model.dflash import forward as dflash
from pipeline.store.layout import CachedSequence
from pipeline.store.reader import open_split
from pipeline.store.writer import write_header
from pipeline.train.evaluation import evaluate as evaluation
from pipeline.train.evaluation.evaluate import evaluate
from pipeline.train.loss.vocab_shard import FrozenTables
from tests.support import training as tiny_training
from tests.support.training import DRAFT

pytestmark = pytest.mark.usefixtures("compiled_quickly")

LONGEST, DRAFTED = 24, DRAFT.block_size - 1


@jax.jit
def proposed(draft, tables, token_id, features, anchor):
    """The tokens of one block, over features of which those it may not see are gone."""
    seen = jnp.arange(LONGEST) < anchor
    features = jnp.where(seen[:, None], jnp.pad(features, ((0, LONGEST - len(features)), (0, 0))), 0)
    context = dflash.context(draft, features[None], jnp.arange(LONGEST)[None])
    ids = blocks.block_token_ids(token_id[None, None], DRAFT.mask_token_id, DRAFT.block_size)
    slots = (anchor + jnp.arange(DRAFT.block_size))[None, None]
    hidden = dflash.denoise_blocks(draft, tables.embedding[ids], slots, context, seen[None, None])
    return (hidden[0, 0, 1:] @ tables.head).argmax(-1)


def written_by_rounds(random, propose, num_tokens):
    """A text whose every round accepts a drawn number of the draft's proposals, and these numbers."""
    prompt_tokens = int(random.integers(2, 5))
    token_ids = np.zeros(num_tokens + DRAFT.block_size, np.int32)
    token_ids[: prompt_tokens + 1] = random.integers(0, 36, prompt_tokens + 1)
    features = random.normal(size=(num_tokens, DRAFT.feature_size)).astype(ml_dtypes.bfloat16)
    anchor, rounds = prompt_tokens, []
    while anchor < num_tokens - 1:
        tokens = np.asarray(propose(jnp.asarray(token_ids[anchor]), jnp.asarray(features), anchor))
        accepted = int(random.integers(0, DRAFTED + 1))
        token_ids[anchor + 1 : anchor + 1 + accepted] = tokens[:accepted]
        other = tokens[accepted] + 1 if accepted < DRAFTED else 0  # behind a whole block anything may come
        token_ids[anchor + 1 + accepted] = other % 36
        rounds.append(min(accepted, num_tokens - anchor - 2))
        anchor += accepted + 1
    return CachedSequence(
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
    draft = tiny_training.draft_of(0)
    keys = jax.random.split(jax.random.key(1), 2)
    embedding = jax.random.normal(keys[0], (DRAFT.vocab_size, DRAFT.hidden_size))
    head = jax.random.normal(keys[1], (DRAFT.hidden_size, DRAFT.vocab_size))
    tables = FrozenTables(embedding, head, DRAFT.vocab_size)
    propose = functools.partial(proposed, draft, tables)
    lengths = [17, 6, 21, 5, 12]  # one with a single block, some that fill no pass
    texts = [written_by_rounds(random, propose, length) for length in lengths]
    shards = tiny_training.write_split(tmp_path, "heldout", [sequence for sequence, _ in texts])
    write_header(tmp_path, tiny_training.layout_of(DRAFT.feature_size), {"train": 0, "heldout": shards})
    found = evaluate(draft, tables, open_split(tmp_path, "heldout"), num_sequences=num_sequences)
    counts = [count for _, rounds in texts[:num_sequences] for count in rounds]
    assert found.total.histogram == tuple(np.bincount(counts, minlength=DRAFT.block_size))
    assert num_sequences or min(found.total.histogram) > 0
    for text, (sequence, rounds) in zip(found.texts, texts[:num_sequences], strict=True):
        assert text.token_ids == tuple(sequence.token_ids.tolist())
        assert (text.prompt_tokens, text.accepted_per_round) == (sequence.prompt_tokens, tuple(rounds))
