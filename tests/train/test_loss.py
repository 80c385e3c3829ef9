"""The loss against plain NumPy, and the walls between blocks."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tiny_training import DRAFT as CONFIG
from tiny_training import weights_of

from pipeline.dflash import blocks
from pipeline.train import cross_entropy
from pipeline.train.loss import Batch, block_hidden, draft_loss

NUM_SEQUENCES, NUM_POSITIONS, NUM_ANCHORS = 3, 32, 4


def batch_of(seed: int) -> Batch:
    random = np.random.default_rng(seed)
    lengths, prompts = random.integers(12, NUM_POSITIONS + 1, NUM_SEQUENCES), random.integers(2, 6, NUM_SEQUENCES)
    positions = np.arange(NUM_POSITIONS)
    generated = (positions >= prompts[:, None]) & (positions < lengths[:, None])
    drawn = [blocks.draw_anchors(random, row, NUM_ANCHORS + row_index) for row_index, row in enumerate(generated)]
    widest = max(len(anchors) for anchors, _ in drawn)
    pad = [(np.pad(a, (0, widest - len(a))), np.pad(t, (0, widest - len(t)))) for a, t in drawn]
    shape = (NUM_SEQUENCES, NUM_POSITIONS)
    return Batch(
        token_ids=random.integers(0, 36, shape).astype(np.int32),
        generated=generated,
        features=random.normal(size=(*shape, CONFIG.feature_size)).astype(ml_dtypes.bfloat16),
        anchors=np.stack([anchors for anchors, _ in pad]),
        anchor_taken=np.stack([taken for _, taken in pad]),
    )


def frozen_of(seed: int) -> tuple[jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(seed), 2)
    size = (CONFIG.vocab_size, CONFIG.hidden_size)
    return jax.random.normal(keys[0], size), jax.random.normal(keys[1], size[::-1])


def on_device(batch: Batch) -> Batch:
    return jax.tree.map(jnp.asarray, batch)


def loss_in_numpy(logits: np.ndarray, batch: Batch, decay: float) -> tuple[float, float, float, int]:
    """Loss, token accuracy, accept length over anchors and tokens counted; one slot at a time."""
    total = weight = 0.0
    right = count = 0
    yields = []
    for row in range(NUM_SEQUENCES):
        for place, anchor in enumerate(batch.anchors[row]):
            if not batch.anchor_taken[row, place]:
                continue
            kept, broken = 0, False
            for slot in range(1, CONFIG.block_size):
                position = anchor + slot
                inside = position < NUM_POSITIONS and batch.generated[row, position]
                if inside:
                    scores = logits[row, place, slot - 1].astype(np.float64)
                    label = batch.token_ids[row, position]
                    cross_entropy = np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[label]
                    factor = np.exp(-(slot - 1) / decay)
                    total, weight = total + factor * cross_entropy, weight + factor
                    right, count = right + (scores.argmax() == label), count + 1
                broken = broken or not inside or logits[row, place, slot - 1].argmax() != batch.token_ids[row, position]
                kept += not broken
            yields.append(kept + 1)
    return total / weight, right / count, float(np.mean(yields)), count


@pytest.mark.parametrize("max_logits", [cross_entropy.MAX_LOGITS, 7 * 37], ids=["at once", "seven slots at a time"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_loss_is_that_of_a_loop_over_slots(seed, max_logits, monkeypatch):
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS", max_logits)
    weights, batch, (embedding, head) = weights_of(seed), batch_of(seed), frozen_of(seed)
    hidden = block_hidden(
        weights, CONFIG, embedding, *map(jnp.asarray, (batch.token_ids, batch.features, batch.anchors))
    )
    logits = np.asarray(hidden) @ np.asarray(head)
    # texts that the draft gets right now and then, so that kept is not always 0
    for row, place in np.argwhere(batch.anchor_taken)[::2]:
        span = batch.anchors[row, place] + np.arange(1, 4)
        span = span[span < NUM_POSITIONS]
        free = ~np.isin(span, batch.anchors[row])  # an anchor's token decides its own block's logits
        batch.token_ids[row, span[free]] = logits[row, place].argmax(-1)[: len(span)][free]
    slot_weights = blocks.slot_weights(CONFIG.block_size, 3.0)
    found, others = draft_loss(weights, CONFIG, embedding, head, on_device(batch), slot_weights)
    wanted, accuracy, accept_length, count = loss_in_numpy(logits, batch, 3.0)
    assert accept_length > 1.1
    assert float(found) == pytest.approx(wanted, rel=1e-5)
    assert float(others["token_accuracy"]) == pytest.approx(accuracy, rel=1e-6)
    assert float(others["anchor_accept_length"]) == pytest.approx(accept_length, rel=1e-6)
    assert int(others["num_tokens"]) == count


def test_chunked_logits_give_the_same_gradients(monkeypatch):
    weights, batch, (embedding, head) = weights_of(0), on_device(batch_of(0)), frozen_of(0)
    slot_weights = blocks.slot_weights(CONFIG.block_size, 3.0)

    def gradients():
        return jax.jit(jax.grad(lambda one: draft_loss(one, CONFIG, embedding, head, batch, slot_weights)[0]))(weights)

    whole = gradients()
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS", 7 * CONFIG.vocab_size)
    for (path, left), right in zip(jax.tree.leaves_with_path(whole), jax.tree.leaves(gradients()), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-6, err_msg=jax.tree_util.keystr(path))
        assert np.abs(left).max() > 0, f"{jax.tree_util.keystr(path)} does not learn"


@pytest.mark.parametrize("seed", range(12))
def test_nothing_outside_a_block_and_its_context_changes_it(seed):
    random = np.random.default_rng(seed)
    weights, (embedding, _) = weights_of(seed % 3), frozen_of(seed % 3)
    batch = batch_of(seed)
    row = int(random.integers(NUM_SEQUENCES))
    place = int(random.choice(np.flatnonzero(batch.anchor_taken[row])))
    anchor = int(batch.anchors[row, place])
    inputs = [np.array(field) for field in (batch.token_ids, batch.features, batch.anchors)]
    before = np.asarray(block_hidden(weights, CONFIG, embedding, *map(jnp.asarray, inputs)))

    token_ids, features, anchors = (field.copy() for field in inputs)
    elsewhere = np.arange(NUM_POSITIONS) != anchor
    token_ids[row, elsewhere] = random.integers(0, 36, elsewhere.sum())  # other blocks' anchors among them
    others = np.arange(anchors.shape[1]) != place
    anchors[row, others] = random.integers(0, NUM_POSITIONS, others.sum())
    late = np.arange(NUM_POSITIONS) >= anchor
    features[row, late] = 100 * random.normal(size=(late.sum(), CONFIG.feature_size))
    changed = list(range(NUM_SEQUENCES))
    changed.remove(row)
    features[changed] = random.normal(size=features[changed].shape)
    after = np.asarray(block_hidden(weights, CONFIG, embedding, *map(jnp.asarray, (token_ids, features, anchors))))
    np.testing.assert_array_equal(before[row, place], after[row, place])

    # and the test can see: its own anchor's token and any feature before it do change it
    for what in ("token", "feature"):
        token_ids, features, anchors = (field.copy() for field in inputs)
        if what == "token":
            token_ids[row, anchor] = (token_ids[row, anchor] + 1) % 36
        else:
            features[row, random.integers(anchor)] += 1
        moved = np.asarray(block_hidden(weights, CONFIG, embedding, *map(jnp.asarray, (token_ids, features, anchors))))
        assert np.abs(moved[row, place] - before[row, place]).max() > 1e-4, what
