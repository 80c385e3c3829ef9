"""Our loss and its gradients against those of two published trainers, SpecForge's and speculators'.

Where a definition of theirs differs from ours, it is the batch or the number of tokens divided by that is changed here
until both compute the same, so that the difference is what the test says and nothing else.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline.dflash import blocks
from pipeline.model.dflash.model import DraftModel
from pipeline.model.hf import dflash as hf_dflash
from pipeline.model.hf.directory import save_draft, weight_paths
from pipeline.train.loss.objective import TrainBatch
from pipeline.train.loss.vocab_shard import FrozenTables
from pipeline.train.recipe import Objective
from tests.support.loss import draft_loss
from tests.support.oracles import run_oracle
from tests.support.training import DRAFT, draft_of

Result = tuple[float, Mapping[str, np.ndarray]]  # a loss, and gradients by the tensors' names in a draft's file

CONFIG = dataclasses.replace(DRAFT, attention_bias=True)
DECAY, SMOOTHING, TOLERANCE = 2.5, 0.4, 1e-5
NUM_POSITIONS = 31
TURNS = {  # spans of generated tokens of each sequence, and its length
    # two turns with a prompt shorter than a block between them, and rows with padding behind
    "padded": [([(5, 13), (15, 26)], 26), ([(3, 17)], 19), ([(7, 12)], 12)],
    "full": [([(5, 31)], 31), ([(4, 31)], 31), ([(6, 31)], 31)],
}
CASES = {  # by the trainers' own names for how slots are weighted
    "specforge": {"trainer": "specforge", "weights": "dflash"},
    "specforge dpace": {"trainer": "specforge", "weights": "dpace"},
    "speculators": {"trainer": "speculators", "weights": "fixed-exp-decay", "loss": "ce"},
    "speculators dpace": {"trainer": "speculators", "weights": "dpace", "loss": "ce"},
    "speculators soft": {"trainer": "speculators", "weights": "fixed-exp-decay", "loss": "kl_div"},
}


def batch_of(name: str) -> TrainBatch:
    """Random texts with a block at each of our candidates; what lies behind a text is as random as the text."""
    random = np.random.default_rng(7)
    shape = (len(TURNS[name]), NUM_POSITIONS)
    generated = np.zeros(shape, dtype=bool)
    for row, (spans, _) in enumerate(TURNS[name]):
        for start, end in spans:
            generated[row, start:end] = True
    batch = TrainBatch(
        token_ids=random.integers(0, CONFIG.vocab_size - 1, shape).astype(np.int32),
        generated=generated,
        features=random.normal(size=(*shape, CONFIG.feature_size)).astype(ml_dtypes.bfloat16),
        anchors=np.zeros((0, 0)),
        anchor_taken=np.zeros((0, 0)),
    )
    return anchored(batch, [blocks.anchor_candidates(row) for row in generated])


def anchored(batch: TrainBatch, anchors: Sequence[Sequence[int]]) -> TrainBatch:
    """The batch with blocks at these positions of each row."""
    places = np.zeros((len(anchors), NUM_POSITIONS), dtype=np.int32)
    taken = np.zeros(places.shape, dtype=bool)
    for index, row in enumerate(anchors):
        places[index, : len(row)], taken[index, : len(row)] = row, True
    return batch._replace(anchors=places, anchor_taken=taken)


@functools.cache
def ends() -> tuple[np.ndarray, np.ndarray]:
    """Embedding and head, both [V, D]."""
    random = np.random.default_rng(11)
    shape = (CONFIG.vocab_size, CONFIG.hidden_size)
    return random.normal(size=shape).astype(np.float32), random.normal(size=shape).astype(np.float32)


def ours(batch: TrainBatch, **options: float) -> Result:
    """With the options of an `Objective`."""
    arrays = TrainBatch(*(None if field is None else jnp.asarray(field) for field in batch))
    weights = tuple(blocks.position_weights(CONFIG.block_size, DECAY).tolist())
    loss, gradients = _loss_and_gradients(draft_of(0, CONFIG), arrays, Objective(weights, **options))
    leaves = {path: np.asarray(leaf) for path, leaf in weight_paths(gradients.weights)}
    return float(loss), hf_dflash.to_files(leaves)


@functools.partial(jax.jit, static_argnums=2)
def _loss_and_gradients(draft: DraftModel, batch: TrainBatch, objective: Objective) -> tuple[jax.Array, DraftModel]:
    embedding, head = ends()
    tables = FrozenTables(jnp.asarray(embedding), jnp.asarray(head.T), CONFIG.vocab_size)

    def loss_of(draft: DraftModel) -> jax.Array:
        return draft_loss(draft, tables, batch, objective)[0]

    return jax.value_and_grad(loss_of)(draft)


@functools.cache
def teacher_hidden() -> np.ndarray:
    """Final hidden states [B, T, D] of a target, as its last norm leaves them."""
    states = np.random.default_rng(13).normal(size=(3, NUM_POSITIONS, CONFIG.hidden_size)).astype(np.float32)
    return states / np.sqrt(np.square(states).mean(axis=-1, keepdims=True))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """What the trainers say of every case."""
    folder = tmp_path_factory.mktemp("trainers")
    (folder / "draft").mkdir()
    save_draft(folder / "draft", draft_of(0, CONFIG), {})
    embedding, head = ends()
    for name, turns in TURNS.items():
        batch = batch_of(name)
        np.savez(
            folder / f"{name}.npz",
            token_ids=batch.token_ids,
            loss_mask=batch.generated,
            lengths=np.array([length for _, length in turns]),
            features=batch.features.astype(np.float32),
            embedding=embedding,
            head=head,
            teacher_hidden=teacher_hidden(),
        )
    cases = {
        f"{name}, {batch}": {**case, "batch": batch, "decay": DECAY, "smoothing": SMOOTHING}
        for name, case in CASES.items()
        for batch in TURNS
    }
    (folder / "cases.json").write_text(json.dumps(cases))
    run_oracle("draft_loss", folder=folder)
    found = {name: load_file(folder / f"{name}.safetensors") for name in cases}
    return {name: (float(tensors.pop("loss")), tensors) for name, tensors in found.items()}


def differences(left: Result, right: Result) -> dict[str, float]:
    """How far each tensor, and the loss, is from the right one, in parts of the right one's largest number."""
    (left_loss, left_gradients), (right_loss, right_gradients) = left, right
    assert left_gradients.keys() == right_gradients.keys()
    found = {"loss": abs(left_loss - right_loss) / abs(right_loss)}
    for name, gradient in right_gradients.items():
        largest = np.abs(gradient).max()
        assert largest > 0, f"{name} does not learn"
        found[name] = np.abs(left_gradients[name] - gradient).max() / largest
    return found


def scaled(result: Result, factor: float) -> Result:
    """The loss and gradients times a number."""
    return factor * result[0], {name: factor * gradient for name, gradient in result[1].items()}


def assert_equal(left: Result, right: Result) -> None:
    wrong = {name: far for name, far in differences(left, right).items() if far > TOLERANCE}
    assert not wrong, wrong


def num_counted(batch: TrainBatch) -> tuple[int, float]:
    """How many slots of the batch learn a token, and the sum of their weights under decay."""
    places = (jnp.asarray(field) for field in (batch.token_ids, batch.generated, batch.anchors))
    counts = np.asarray(blocks.block_labels(*places, CONFIG.block_size)[1]) & batch.anchor_taken[..., None]
    return int(counts.sum()), float((counts * blocks.position_weights(CONFIG.block_size, DECAY)).sum())


def ours_per_token(batch: TrainBatch, **options: float) -> Result:
    """Ours, which is divided by the sum of slots' weights or by the number of sequences, by that of tokens instead."""
    tokens, weight = num_counted(batch)
    divided_by = len(batch.token_ids) if "dpace_smoothing" in options else weight
    return scaled(ours(batch, **options), divided_by / tokens)


def as_speculators_has_it(name: str) -> TrainBatch:
    """The batch with blocks where speculators starts them.

    It asks only that a block's first token is generated, not the next one too, and that the block ends within its one
    row, in which all sequences lie end to end.
    """
    batch = batch_of(name)
    anchors = [np.flatnonzero(row) for row in batch.generated]
    anchors[-1] = anchors[-1][anchors[-1] < NUM_POSITIONS - CONFIG.block_size]
    return anchored(batch, anchors)


@pytest.mark.parametrize("batch", list(TURNS))
def test_the_loss_and_every_gradient_are_specforges(theirs, batch):
    assert_equal(ours(batch_of(batch)), theirs[f"specforge, {batch}"])


@pytest.mark.parametrize("batch", list(TURNS))
def test_with_dpace_too(theirs, batch):
    assert_equal(ours(batch_of(batch), dpace_smoothing=SMOOTHING), theirs[f"specforge dpace, {batch}"])


@pytest.mark.parametrize("batch", list(TURNS))
def test_they_are_speculators_when_blocks_start_where_it_starts_them_and_tokens_divide_the_sum(theirs, batch):
    wanted = theirs[f"speculators, {batch}"]
    assert_equal(ours_per_token(as_speculators_has_it(batch)), wanted)
    # and where ours start, the loss is another: this is the whole difference
    assert differences(ours_per_token(batch_of(batch)), wanted)["loss"] > 1e-3


@pytest.mark.parametrize("batch", list(TURNS))
def test_with_speculators_default_of_dpace_too(theirs, batch):
    found = ours_per_token(as_speculators_has_it(batch), dpace_smoothing=SMOOTHING)
    assert_equal(found, theirs[f"speculators dpace, {batch}"])


@pytest.mark.parametrize("batch", list(TURNS))
def test_soft_targets_have_the_gradients_of_speculators_divergence(theirs, batch):
    given = as_speculators_has_it(batch)._replace(teacher_hidden=teacher_hidden())
    found = differences(ours_per_token(given, distillation=1.0), theirs[f"speculators soft, {batch}"])
    assert found.pop("loss") > 1e-3  # a divergence is the cross entropy less the target's own entropy, a constant
    assert max(found.values()) < TOLERANCE, found
