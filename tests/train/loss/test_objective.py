"""The loss against plain NumPy, and the walls between blocks."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh

from pipeline.dflash import blocks
from pipeline.errors import PipelineError
from pipeline.train.accumulation import accumulated, require_divisible_batch
from pipeline.train.loss import cross_entropy
from pipeline.train.loss.cross_entropy import token_losses
from pipeline.train.loss.objective import TrainBatch, block_hidden, draft_sums, normaliser
from pipeline.train.loss.position_weights import dpace
from pipeline.train.loss.vocab_shard import FrozenTables
from pipeline.train.recipe import Objective
from tests.support.loss import draft_loss
from tests.support.training import DRAFT as CONFIG
from tests.support.training import draft_of

pytestmark = pytest.mark.usefixtures("compiled_quickly")
hidden_of = jax.jit(block_hidden)
OBJECTIVE = Objective(tuple(blocks.position_weights(CONFIG.block_size, 3.0).tolist()))
NUM_SEQUENCES, NUM_POSITIONS, NUM_ANCHORS = 3, 32, 4


def batch_of(seed: int) -> TrainBatch:
    random = np.random.default_rng(seed)
    lengths, prompts = random.integers(12, NUM_POSITIONS + 1, NUM_SEQUENCES), random.integers(2, 6, NUM_SEQUENCES)
    positions = np.arange(NUM_POSITIONS)
    generated = (positions >= prompts[:, None]) & (positions < lengths[:, None])
    drawn = [blocks.draw_anchors(random, row, NUM_ANCHORS + row_index) for row_index, row in enumerate(generated)]
    widest = max(len(anchors) for anchors, _ in drawn)
    pad = [(np.pad(a, (0, widest - len(a))), np.pad(t, (0, widest - len(t)))) for a, t in drawn]
    shape = (NUM_SEQUENCES, NUM_POSITIONS)
    return TrainBatch(
        token_ids=random.integers(0, 36, shape).astype(np.int32),
        generated=generated,
        features=random.normal(size=(*shape, CONFIG.feature_size)).astype(ml_dtypes.bfloat16),
        anchors=np.stack([anchors for anchors, _ in pad]),
        anchor_taken=np.stack([taken for _, taken in pad]),
    )


def tables_of(seed: int) -> FrozenTables:
    keys = jax.random.split(jax.random.key(seed), 2)
    size = (CONFIG.vocab_size, CONFIG.hidden_size)
    return FrozenTables(jax.random.normal(keys[0], size), jax.random.normal(keys[1], size[::-1]), CONFIG.vocab_size)


@partial(jax.jit, static_argnames=("objective", "max_logits"))
def loss_of(draft, tables, batch, *, objective=OBJECTIVE, max_logits=None):
    """What `draft_loss` gives; a program of its own for each `max_logits`, which the test has set."""
    return draft_loss(draft, tables, batch, objective)


def on_device(batch: TrainBatch) -> TrainBatch:
    return jax.tree.map(jnp.asarray, batch)


def loss_in_numpy(logits: np.ndarray, batch: TrainBatch, decay: float) -> tuple[float, float, float, int]:
    """Loss, token accuracy, accept length over anchors and tokens counted; one slot at a time."""
    total = weight = 0.0
    right = count = 0
    yields = []
    for row in range(NUM_SEQUENCES):
        for place, anchor in enumerate(batch.anchors[row]):
            if not batch.anchor_taken[row, place]:
                continue
            accepted, broken = 0, False
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
                accepted += not broken
            yields.append(accepted + 1)
    return total / weight, right / count, float(np.mean(yields)), count


@pytest.mark.parametrize("max_logits", [cross_entropy.MAX_LOGITS, 7 * 37], ids=["at once", "seven slots at a time"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_loss_is_that_of_a_loop_over_slots(seed, max_logits, monkeypatch):
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS", max_logits)
    draft, batch, tables = draft_of(seed), batch_of(seed), tables_of(seed)
    hidden = hidden_of(draft, tables, *map(jnp.asarray, (batch.token_ids, batch.features, batch.anchors)))
    logits = np.asarray(hidden) @ np.asarray(tables.head)
    # texts that the draft gets right now and then, so that some of it is accepted
    for row, place in np.argwhere(batch.anchor_taken)[::2]:
        span = batch.anchors[row, place] + np.arange(1, 4)
        span = span[span < NUM_POSITIONS]
        free = ~np.isin(span, batch.anchors[row])  # an anchor's token decides its own block's logits
        batch.token_ids[row, span[free]] = logits[row, place].argmax(-1)[: len(span)][free]
    found, others = loss_of(draft, tables, on_device(batch), max_logits=max_logits)
    wanted, accuracy, accept_length, count = loss_in_numpy(logits, batch, 3.0)
    assert accept_length > 1.1
    assert float(found) == pytest.approx(wanted, rel=1e-5)
    assert float(others["token_accuracy"]) == pytest.approx(accuracy, rel=1e-6)
    assert float(others["anchor_accept_length"]) == pytest.approx(accept_length, rel=1e-6)
    assert int(others["num_tokens"]) == count


SHALLOW = dataclasses.replace(CONFIG, num_hidden_layers=1)


@partial(jax.jit, static_argnames="max_logits")
def loss_and_gradients(masters, tables, batch, *, max_logits=None):
    """Of a draft by its masters, used in the arithmetic of the tables; `max_logits` as in `loss_of`."""

    def loss(masters):
        used = jax.tree.map(lambda array: array.astype(tables.embedding.dtype), masters)
        return draft_loss(used, tables, batch, OBJECTIVE)[0]

    return jax.value_and_grad(loss)(masters)


def test_chunked_logits_give_the_same_gradients(monkeypatch):
    given = draft_of(0, SHALLOW), tables_of(0), on_device(batch_of(0))
    _, whole = loss_and_gradients(*given)
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS", max_logits := 7 * CONFIG.vocab_size)
    _, chunked = loss_and_gradients(*given, max_logits=max_logits)
    for (path, left), right in zip(jax.tree.leaves_with_path(whole), jax.tree.leaves(chunked), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-6, err_msg=jax.tree_util.keystr(path))
        assert np.abs(left).max() > 0, f"{jax.tree_util.keystr(path)} does not learn"


@pytest.mark.parametrize("seed", range(12))
def test_nothing_outside_a_block_and_its_context_changes_it(seed):
    random = np.random.default_rng(seed)
    draft, tables = draft_of(seed % 3), tables_of(seed % 3)
    batch = batch_of(seed)
    row = int(random.integers(NUM_SEQUENCES))
    place = int(random.choice(np.flatnonzero(batch.anchor_taken[row])))
    anchor = int(batch.anchors[row, place])
    inputs = [np.array(field) for field in (batch.token_ids, batch.features, batch.anchors)]
    before = np.asarray(hidden_of(draft, tables, *map(jnp.asarray, inputs)))

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
    after = np.asarray(hidden_of(draft, tables, *map(jnp.asarray, (token_ids, features, anchors))))
    np.testing.assert_array_equal(before[row, place], after[row, place])

    # and the test can see: its own anchor's token and any feature before it do change it
    for what in ("token", "feature"):
        token_ids, features, anchors = (field.copy() for field in inputs)
        if what == "token":
            token_ids[row, anchor] = (token_ids[row, anchor] + 1) % 36
        else:
            features[row, random.integers(anchor)] += 1
        moved = np.asarray(hidden_of(draft, tables, *map(jnp.asarray, (token_ids, features, anchors))))
        assert np.abs(moved[row, place] - before[row, place]).max() > 1e-4, what


def dpace_in_numpy(nll: np.ndarray, counts: np.ndarray, smoothing: float) -> np.ndarray:
    """One block's weights, by their definition."""
    weights = np.zeros(len(nll))
    for slot in np.flatnonzero(counts):
        for later in range(slot, len(nll)):
            if counts[later]:
                reached = [(1 - smoothing) * np.exp(-nll[at]) + smoothing for at in range(later + 1) if counts[at]]
                weights[slot] += np.prod(reached)
    return weights


@pytest.mark.parametrize("smoothing", [0.0, 0.5, 1.0])
def test_dpace_weighs_a_slot_by_all_that_it_opens_the_way_to(smoothing):
    random = np.random.default_rng(3)
    nll, counts = random.exponential(size=(20, 7)), random.random((20, 7)) < 0.7
    found = dpace(jnp.asarray(nll, jnp.float32), jnp.asarray(counts), smoothing)
    wanted = [dpace_in_numpy(*block, smoothing) for block in zip(nll, counts, strict=True)]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    peak = wide.max(-1, keepdims=True)
    return wide - peak - np.log(np.exp(wide - peak).sum(-1, keepdims=True))


@pytest.mark.parametrize(
    ("distillation", "smoothing"), [(0.4, None), (1.0, 0.5), (0.0, 0.5)], ids=["decay", "teacher alone", "dpace alone"]
)
def test_a_distilled_loss_is_that_of_a_loop_over_slots(distillation, smoothing, monkeypatch):
    """Two chunks; the teacher of slot k is the target's state at anchor + k - 1."""
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS", 40 * CONFIG.vocab_size)
    draft, batch, tables = draft_of(1), batch_of(1), tables_of(1)
    random = np.random.default_rng(9)
    states = random.normal(size=(NUM_SEQUENCES, NUM_POSITIONS, CONFIG.hidden_size)).astype(np.float32)
    hidden = hidden_of(draft, tables, *map(jnp.asarray, (batch.token_ids, batch.features, batch.anchors)))
    drafted, taught = (log_softmax(np.asarray(one) @ np.asarray(tables.head)) for one in (hidden, states))
    total = weight_of_all = 0.0
    for row, place in np.argwhere(batch.anchor_taken):
        positions = batch.anchors[row, place] + np.arange(1, CONFIG.block_size)
        counts = np.array([at < NUM_POSITIONS and batch.generated[row, at] for at in positions])
        inside = np.minimum(positions, NUM_POSITIONS - 1)
        text = -drafted[row, place, np.arange(len(inside)), batch.token_ids[row, inside]]
        soft = -(np.exp(taught[row, positions[counts] - 1]) * drafted[row, place, counts]).sum(-1)
        mixed = (1 - distillation) * text[counts] + distillation * soft
        factor = OBJECTIVE.weights[1:] if smoothing is None else dpace_in_numpy(text, counts, smoothing)
        total += (factor[counts] * mixed).sum()
        weight_of_all += factor[counts].sum()
    wanted = total / (weight_of_all if smoothing is None else NUM_SEQUENCES)
    taught_batch = on_device(batch._replace(teacher_hidden=states if distillation else None))
    objective = dataclasses.replace(OBJECTIVE, dpace_smoothing=smoothing, distillation=distillation)
    found, _ = loss_of(draft, tables, taught_batch, objective=objective)
    assert float(found) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("distillation", [0.0, 0.4])
def test_the_gradient_made_in_the_forward_pass_is_the_derivative(distillation):
    random = np.random.default_rng(2)
    shape = (2, 3, 4)
    hidden, teacher = (jnp.asarray(random.normal(size=(*shape, 20)), jnp.float32) for _ in range(2))
    labels, weight = jnp.asarray(random.integers(0, 37, shape)), jnp.asarray(random.random(shape), jnp.float32)
    tables = dataclasses.replace(tables_of(0), head=tables_of(0).head / 4)
    taught = teacher if distillation else None

    def plainly(hidden):
        logits = jax.nn.log_softmax(hidden @ tables.head)
        text = -jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
        soft = -(jax.nn.softmax(teacher @ tables.head) * logits).sum(-1)
        return (weight * ((1 - distillation) * text + distillation * soft)).sum()

    def ours(hidden):
        made = token_losses(tables, hidden, labels, taught, distillation=distillation)
        return (weight * made.loss).sum()

    (wanted, slope), (found, gradient) = (jax.jit(jax.value_and_grad(one))(hidden) for one in (plainly, ours))
    assert float(found) == pytest.approx(float(wanted), rel=1e-6)
    np.testing.assert_allclose(gradient, slope, atol=1e-6)
    in_bfloat16 = jax.grad(lambda one: ours(one.astype(jnp.bfloat16)))(hidden)
    assert in_bfloat16.dtype == jnp.float32
    np.testing.assert_allclose(in_bfloat16, slope, atol=0.02 * float(jnp.abs(slope).max()))


def test_bfloat16_arithmetic_keeps_losses_and_gradients_in_float32():
    draft, tables, batch = draft_of(0, SHALLOW), tables_of(0), on_device(batch_of(0))
    exact, gradients = loss_and_gradients(draft, tables, batch)
    in_bfloat16 = jax.tree.map(lambda table: table.astype(jnp.bfloat16), tables)
    found, rounded = loss_and_gradients(draft, in_bfloat16, batch)
    assert found.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(rounded)} == {jnp.dtype(jnp.float32)}
    assert float(found) == pytest.approx(float(exact), rel=0.02)
    norms = [np.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(tree))) for tree in (gradients, rounded)]
    assert norms[1] == pytest.approx(norms[0], rel=0.1)


def test_what_is_summed_over_words_is_float32_in_bfloat16_arithmetic():
    tables = jax.tree.map(lambda table: table.astype(jnp.bfloat16), tables_of(0))
    hidden = jnp.zeros((1, 2, 20), jnp.bfloat16)
    labels = jnp.zeros((1, 2), int)
    program = jax.make_jaxpr(lambda hidden: token_losses(tables, hidden, labels))(hidden)
    (call,) = [one for one in program.eqns if "custom_vjp" in one.primitive.name]
    inner = call.params["call_jaxpr"].eqns
    kinds = {name: {str(one.outvars[0].aval.dtype) for one in inner if one.primitive.name == name}
             for name in ("dot_general", "exp", "reduce_sum", "log")}  # fmt: skip
    assert kinds == {name: {"float32"} for name in kinds}


def both_batches() -> TrainBatch:
    """Six rows, of unequal weight."""
    two = [batch_of(seed) for seed in (3, 4)]
    wide = max(one.anchors.shape[1] for one in two)

    def joined(name: str) -> np.ndarray:
        fields = [getattr(one, name) for one in two]
        if name.startswith("anchor"):
            fields = [np.pad(field, [(0, 0), (0, wide)])[:, :wide] for field in fields]
        return np.concatenate(fields)

    return on_device(TrainBatch(*map(joined, TrainBatch._fields[:5])))


@pytest.mark.parametrize(
    "smoothing", [pytest.param(None, id="decay"), pytest.param(0.5, id="dpace", marks=pytest.mark.slow)]
)
def test_accumulated_gradients_are_those_of_the_whole_batch(smoothing):
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1, 1), ("dp", "fsdp", "ep", "tp", "sp"))
    draft, tables, batch = draft_of(0, SHALLOW), tables_of(0), both_batches()
    objective = dataclasses.replace(OBJECTIVE, dpace_smoothing=smoothing)
    total = normaliser(SHALLOW, batch, objective)

    def loss_of(draft, part):
        sums = draft_sums(draft, tables, part, objective, total)
        return sums.loss, sums

    def made(num_parts):
        differentiate = jax.value_and_grad(loss_of, has_aux=True)
        return jax.jit(lambda draft: accumulated(differentiate, draft, batch, num_parts, mesh))(draft)

    (loss, sums), gradients = made(1)
    (parts_loss, parts_sums), parts_gradients = made(3)
    assert float(parts_loss) == pytest.approx(float(loss), rel=1e-6)
    for name, value in sums.metrics().items():
        assert float(parts_sums.metrics()[name]) == pytest.approx(float(value), rel=1e-6), name
    for left, right in zip(jax.tree.leaves(gradients), jax.tree.leaves(parts_gradients), strict=True):
        rounding = 2e-6 * float(np.abs(left).max())  # sums cancel: float32 rounds them by their largest terms
        np.testing.assert_allclose(left, right, rtol=0, atol=rounding)


def test_a_batch_in_which_nothing_counts_has_no_loss_and_no_gradient():
    batch = batch_of(0)
    batch = on_device(batch._replace(anchor_taken=np.zeros_like(batch.anchor_taken)))

    found, gradients = loss_and_gradients(draft_of(0, SHALLOW), tables_of(0), batch)
    assert float(found) == 0
    assert not any(np.abs(leaf).max() for leaf in jax.tree.leaves(gradients))


def test_rows_that_devices_and_parts_do_not_share_out_evenly_are_refused():
    require_divisible_batch(16, 2, data=2, fsdp=4)
    with pytest.raises(PipelineError, match=r"train.batch_sequences is 12; .* train.mesh.fsdp \(1 x 2 x 4\)"):
        require_divisible_batch(12, 1, data=2, fsdp=4)
