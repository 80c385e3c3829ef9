"""Which sequences share a row, and that sharing one changes no number."""

import collections
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipeline.dflash import blocks
from pipeline.errors import PipelineError
from pipeline.store.reader import open_split
from pipeline.train.data import packing
from pipeline.train.data.packed import PackedBatches
from pipeline.train.data.padded import PaddedBatches
from pipeline.train.loss.objective import TrainBatch, draft_sums, normaliser
from pipeline.train.loss.vocab_shard import FrozenTables
from pipeline.train.recipe import Objective
from tests.support import training as tiny_training

pytestmark = pytest.mark.usefixtures("compiled_quickly")
CONFIG = dataclasses.replace(tiny_training.DRAFT, vocab_size=61, mask_token_id=60, num_hidden_layers=1)
NUM_TRAIN, ROW_TOKENS, NUM_ANCHORS, SEED = 11, 128, 7, 3
WEIGHTS = tuple(blocks.position_weights(CONFIG.block_size, 3.0).tolist())
OBJECTIVES = {"decay": Objective(WEIGHTS), "dpace": Objective(WEIGHTS, dpace_smoothing=0.5)}


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    root = tmp_path_factory.mktemp("store")
    return open_split(tiny_training.write_store(root, CONFIG.feature_size, num_train=NUM_TRAIN), "train")


def packed_of(split, **changes):
    options = {"num_rows": 2, "row_tokens": ROW_TOKENS, "num_anchors": NUM_ANCHORS, "seed": SEED}
    return PackedBatches(split, **{**options, **changes})


def texts_of(batch):
    """The features of every sequence of a packed batch, in order."""
    found = []
    for starts, features in zip(batch["starts"], batch["features"], strict=True):
        first = [place for place in range(len(starts)) if starts[place] == place]
        found += [features[place : place + int((starts == place).sum())].tobytes() for place in first]
    return found


def test_rows_hold_every_index_once_and_are_as_full_as_can_be():
    random = np.random.default_rng(0)
    for _ in range(50):
        capacity = int(random.integers(10, 60))
        costs = random.integers(1, capacity + 1, int(random.integers(1, 80)))
        order = np.argsort(-costs, kind="stable")
        rows = packing.pack(costs, order.tolist(), capacity)
        assert sorted(index for row in rows for index in row) == list(range(len(costs)))
        filled = [int(costs[row].sum()) for row in rows]
        assert max(filled) <= capacity
        assert len(rows) <= 11 / 9 * -(-int(costs.sum()) // capacity) + 1  # the bound of best-fit decreasing
        drawn = random.permutation(len(costs))
        again = packing.pack(costs, drawn[np.argsort(-costs[drawn], kind="stable")].tolist(), capacity)
        assert sorted(int(costs[row].sum()) for row in again) == sorted(filled)


def test_an_index_goes_where_it_leaves_the_least_room():
    assert packing.pack(np.array([6, 5, 4, 3, 2]), range(5), 10) == [[0, 2], [1, 3, 4]]
    assert packing.pack(np.array([7, 6, 3]), range(3), 10) == [[0, 2], [1]]


def test_rows_have_room_for_the_anchors_of_all_their_sequences():
    random = np.random.default_rng(1)
    for _ in range(50):
        num_tokens = random.integers(2, 200, 60)
        num_anchors = np.minimum(random.integers(0, 90, 60), num_tokens - 1)
        row_anchors = packing.anchors_per_row(num_tokens, num_anchors, 256)
        costs = packing.costs_of(num_tokens, num_anchors, 256, row_anchors)
        for row in packing.pack(costs, np.argsort(-costs, kind="stable").tolist(), 256):
            assert num_tokens[row].sum() <= 256
            assert num_anchors[row].sum() <= row_anchors


def test_each_epoch_shows_every_sequence_exactly_once_in_rows_of_one_shape(split):
    batches = packed_of(split)
    num_steps = batches.steps_per_epoch
    assert 1 < num_steps < -(-NUM_TRAIN // 2)  # fewer rows than sequences
    wanted = collections.Counter(one.features.tobytes() for one in split.read(range(NUM_TRAIN)))
    orders = []
    for epoch in range(3):
        made = [batches.at(step) for step in range(epoch * num_steps, (epoch + 1) * num_steps)]
        assert {batch["token_ids"].shape for batch in made} == {(2, ROW_TOKENS)}
        assert {batch["anchors"].shape for batch in made} == {(2, batches.row_anchors)}
        orders.append([text for batch in made for text in texts_of(batch)])
        assert collections.Counter(orders[-1]) == wanted
    assert len({tuple(order) for order in orders}) == 3


def test_a_step_can_be_made_alone_and_the_seed_decides(split):
    one, other = packed_of(split), packed_of(split)
    for step in range(5):
        one.at(step)
    for name, array in one.at(5).items():
        np.testing.assert_array_equal(array, other.at(5)[name], err_msg=name)
    assert texts_of(one.at(0)) != texts_of(packed_of(split, seed=SEED + 1).at(0))


def test_anchors_lie_in_their_own_sequences_which_have_as_many_as_padded_rows_have(split):
    batches = packed_of(split, num_rows=NUM_TRAIN)
    batch = batches.at(0)
    assert batches.steps_per_epoch == 1
    counts = collections.Counter()
    for row in range(NUM_TRAIN):
        anchors = batch["anchors"][row][batch["anchor_taken"][row]]
        starts = batch["starts"][row]
        np.testing.assert_array_equal(starts[anchors], starts[anchors + 1])  # the first drafted token is its own
        assert batch["generated"][row][anchors].all()
        counts.update((row, start) for start in starts[anchors].tolist())
    wanted = np.minimum(split.num_tokens - split.prompt_tokens - 1, NUM_ANCHORS)
    assert sorted(counts.values()) == sorted(wanted.tolist())


def test_a_sequence_that_is_longer_than_a_row_is_refused(split):
    longest, num_longer = int(split.num_tokens.max()), int((split.num_tokens > 30).sum())
    with pytest.raises(
        PipelineError, match=rf"train.pack_tokens is 30; {num_longer} of 11 .* the longest has {longest}"
    ):
        packed_of(split, row_tokens=30)


def differentiated(objective):
    """Sums and gradients of a batch under a normaliser, compiled once for each shape of a batch."""
    random = np.random.default_rng(0)
    embedding, head = (jnp.asarray(random.normal(size=(61, 20)), jnp.float32) for _ in range(2))
    tables = FrozenTables(embedding, head.T, 61)
    draft = tiny_training.draft_of(0, CONFIG)

    def loss_of(draft, batch, total):
        sums = draft_sums(draft, tables, batch, objective, total)
        return sums.loss, sums

    compiled = jax.jit(jax.value_and_grad(loss_of, has_aux=True))

    def made(batch, total):
        (_, sums), gradients = compiled(draft, batch, total)
        return jax.device_get((sums, gradients))

    return made


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_packed_rows_have_the_loss_and_gradients_of_padded_ones_and_of_sequences_alone(split, objective):
    packed = TrainBatch(**jax.tree.map(jnp.asarray, packed_of(split, num_rows=6).at(0)))
    padded_batches = PaddedBatches(split, num_sequences=NUM_TRAIN, num_anchors=NUM_ANCHORS, seed=SEED)
    padded = TrainBatch(**jax.tree.map(jnp.asarray, padded_batches.at(0)))
    assert packed.starts is not None
    assert padded.starts is None
    total = normaliser(CONFIG, packed, objective)
    assert float(total) == pytest.approx(float(normaliser(CONFIG, padded, objective)), rel=1e-6)
    made = differentiated(objective)
    found = made(packed, total)
    rows = [
        TrainBatch(*(field if field is None else field[row : row + 1] for field in padded)) for row in range(NUM_TRAIN)
    ]
    alone = [made(row, total) for row in rows]
    one_by_one = jax.tree.map(lambda *parts: sum(parts), *alone)
    for wanted in (made(padded, total), one_by_one):
        for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-5)
    assert found[0].num_tokens > 100


def test_no_sequence_of_a_row_knows_of_another(split):
    batch = packed_of(split, num_rows=NUM_TRAIN).at(0)
    row = next(row for row in range(NUM_TRAIN) if len(set(batch["starts"][row].tolist()) - {ROW_TOKENS}) == 3)
    second = np.unique(batch["starts"][row])[1]
    others = batch["starts"][row] != second
    changed = {name: array.copy() for name, array in batch.items()}
    changed["features"][row, others] = 100
    changed["token_ids"][row, others] = 1
    mine = batch["anchor_taken"][row] & (batch["starts"][row][batch["anchors"][row]] == second)
    for one in (batch, changed):
        one["anchor_taken"] = np.zeros_like(batch["anchor_taken"])
        one["anchor_taken"][row] = mine
    made = differentiated(OBJECTIVES["decay"])
    before, after = (made(TrainBatch(**jax.tree.map(jnp.asarray, one)), jnp.float32(1))[0] for one in (batch, changed))
    assert before.num_tokens > 0
    assert before == after


def test_the_stage_trains_on_packed_rows_with_every_knob_of_the_step(tmp_path):
    train = {"pack_tokens": 96, "batch_sequences": 4, "accumulation": 2, "loss_weights": "dpace", "remat": True}
    config = tiny_training.prepare(tmp_path, **train)
    with tiny_training.start(tmp_path, **train) as process:
        output, errors = process.communicate(timeout=tiny_training.LIMIT_SECONDS)
    assert process.returncode == 0, errors
    losses = {step: value for name, step, value in json.loads(output) if name == "train/loss"}
    assert sorted(losses) == list(range(1, config.train.steps + 1))
    assert max(losses[step] for step in (10, 11, 12)) < losses[1]  # though D-PACE's weights grow with what is right
