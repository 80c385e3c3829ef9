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
from oracle_environment import run_oracle
from safetensors.numpy import load_file
from tiny_training import DRAFT, weights_of

from pipeline.dflash import blocks
from pipeline.model import checkpoints, hf_draft
from pipeline.model.draft import DraftWeights
from pipeline.train.loss import Batch, draft_loss

Result = tuple[float, Mapping[str, np.ndarray]]  # a loss, and gradients by the tensors' names in a draft's file

CONFIG = dataclasses.replace(DRAFT, attention_bias=True)
DECAY, SMOOTHING, TOLERANCE = 2.5, 0.4, 1e-5
NUM_POSITIONS = 31
TURNS = {  # spans of generated tokens of each sequence, and its length
    # two turns with a prompt shorter than a block between them, and rows with padding behind
    "padded": [([(5, 13), (15, 26)], 26), ([(3, 17)], 19), ([(7, 12)], 12)],
    "full": [([(5, 31)], 31), ([(4, 31)], 31), ([(6, 31)], 31)],
}
TRAINERS = {"specforge": "dflash", "speculators": "fixed-exp-decay"}
CASES = {
    f"{trainer}, {batch}": {"trainer": trainer, "batch": batch, "weights": weights}
    for trainer, weights in TRAINERS.items()
    for batch in TURNS
}


def batch_of(name: str) -> Batch:
    """Random texts with a block at each of our candidates; what lies behind a text is as random as the text."""
    random = np.random.default_rng(7)
    shape = (len(TURNS[name]), NUM_POSITIONS)
    generated = np.zeros(shape, dtype=bool)
    for row, (spans, _) in enumerate(TURNS[name]):
        for start, end in spans:
            generated[row, start:end] = True
    batch = Batch(
        token_ids=random.integers(0, CONFIG.vocab_size - 1, shape).astype(np.int32),
        generated=generated,
        features=random.normal(size=(*shape, CONFIG.feature_size)).astype(ml_dtypes.bfloat16),
        anchors=np.zeros((0, 0)),
        anchor_taken=np.zeros((0, 0)),
    )
    return anchored(batch, [blocks.anchor_candidates(row) for row in generated])


def anchored(batch: Batch, anchors: Sequence[Sequence[int]]) -> Batch:
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


def ours(batch: Batch) -> Result:
    loss, gradients = _loss_and_gradients(weights_of(0, CONFIG), Batch(*(jnp.asarray(field) for field in batch)))
    leaves = {path: np.asarray(leaf) for path, leaf in checkpoints.weight_paths(gradients)}
    return float(loss), hf_draft.to_files(leaves)


@jax.jit
@jax.value_and_grad
def _loss_and_gradients(weights: DraftWeights, batch: Batch) -> jax.Array:
    embedding, head = ends()
    slot_weights = blocks.slot_weights(CONFIG.block_size, DECAY)
    return draft_loss(weights, CONFIG, jnp.asarray(embedding), jnp.asarray(head.T), batch, slot_weights)[0]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """What the trainers say of every case."""
    folder = tmp_path_factory.mktemp("trainers")
    (folder / "draft").mkdir()
    checkpoints.save_draft(folder / "draft", CONFIG, weights_of(0, CONFIG), {})
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
        )
    cases = {name: {**case, "decay": DECAY, "smoothing": SMOOTHING} for name, case in CASES.items()}
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


def per_token(batch: Batch, result: Result) -> Result:
    """Our result, which is divided by the sum of the slots' weights, divided by the number of tokens instead."""
    places = (jnp.asarray(field) for field in (batch.token_ids, batch.generated, batch.anchors))
    counts = np.asarray(blocks.block_labels(*places, CONFIG.block_size)[1]) & batch.anchor_taken[..., None]
    return scaled(result, float((counts * blocks.slot_weights(CONFIG.block_size, DECAY)).sum() / counts.sum()))


def anchors_of(batch: Batch) -> list[list[int]]:
    return [row[taken].tolist() for row, taken in zip(batch.anchors, batch.anchor_taken, strict=True)]


@pytest.mark.parametrize("batch", list(TURNS))
def test_the_loss_and_every_gradient_are_specforges(theirs, batch):
    assert_equal(ours(batch_of(batch)), theirs[f"specforge, {batch}"])


def test_speculators_divides_by_tokens_and_starts_a_block_at_a_turns_last_token_too(theirs):
    batch, wanted = batch_of("padded"), theirs["speculators, padded"]
    assert differences(per_token(batch, ours(batch)), wanted)["loss"] > 1e-3
    first, *others = anchors_of(batch)
    (_, end), _ = TURNS["padded"][0][0]
    assert end - 1 not in first
    more = anchored(batch, [sorted([*first, end - 1]), *others])
    assert_equal(per_token(more, ours(more)), wanted)


def test_speculators_starts_no_block_that_its_one_row_would_cut(theirs):
    batch, wanted = batch_of("full"), theirs["speculators, full"]
    assert differences(per_token(batch, ours(batch)), wanted)["loss"] > 1e-3
    *others, last = anchors_of(batch)  # the sequences lie end to end: only the last one ends where the row does
    fewer = anchored(batch, [*others, [anchor for anchor in last if anchor < NUM_POSITIONS - CONFIG.block_size]])
    assert_equal(per_token(fewer, ours(fewer)), wanted)
