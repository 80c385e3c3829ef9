"""Where blocks stand, what they see and what they learn."""

import jax.numpy as jnp
import numpy as np
import pytest

from pipeline.dflash import blocks
from pipeline.errors import PipelineError


def test_the_anchor_enters_at_position_0_and_masks_at_the_others():
    ids = blocks.block_token_ids(jnp.array([[7, 8, 9], [4, 5, 6]]), 99, 4)
    assert ids.shape == (2, 3, 4)
    assert ids[1, 2].tolist() == [6, 99, 99, 99]
    assert ids[0, 0].tolist() == [7, 99, 99, 99]


def test_a_block_holds_the_positions_from_its_anchor_on():
    assert blocks.block_positions(jnp.array([3, 10]), 4).tolist() == [[3, 4, 5, 6], [10, 11, 12, 13]]


def test_a_block_sees_the_context_strictly_before_its_anchor():
    visible = blocks.context_visible(jnp.array([[0, 2], [4, 9]]), 5)
    assert visible.sum(-1).tolist() == [[0, 2], [4, 5]]
    assert visible[0, 1].tolist() == [True, True, False, False, False]


CANDIDATES = {
    "prompt, then text": ([0, 0, 1, 1, 1, 1], [2, 3, 4]),  # the last token has none behind it
    "two stretches": ([0, 1, 1, 0, 1, 1, 1], [1, 4, 5]),
    "lone tokens": ([0, 1, 0, 1, 0], []),
    "prompt alone": ([0, 0, 0], []),
    "padding behind": ([0, 1, 1, 0, 0], [1]),
}


@pytest.mark.parametrize(("generated", "wanted"), CANDIDATES.values(), ids=CANDIDATES.keys())
def test_blocks_start_at_generated_tokens_that_a_generated_token_follows(generated, wanted):
    assert blocks.anchor_candidates(np.array(generated, bool)).tolist() == wanted


def test_anchors_are_drawn_without_replacement_sorted_and_among_the_candidates():
    random = np.random.default_rng(0)
    for _ in range(200):
        generated = random.random(int(random.integers(2, 40))) < 0.7
        num_anchors = int(random.integers(1, 12))
        anchors, taken = blocks.draw_anchors(random, generated, num_anchors)
        candidates = blocks.anchor_candidates(generated)
        assert anchors.shape == taken.shape == (num_anchors,)
        assert taken.sum() == min(num_anchors, len(candidates))
        drawn = anchors[taken].tolist()
        assert drawn == sorted(set(drawn))
        assert set(drawn) <= set(candidates.tolist())
        assert not anchors[~taken].any()
        assert taken.tolist() == sorted(taken.tolist(), reverse=True)  # empty places come last


def test_every_epoch_draws_its_own_anchors_and_the_same_seed_the_same_ones():
    generated = np.arange(100) >= 20
    draws = [blocks.draw_anchors(np.random.default_rng([0, epoch]), generated, 12)[0].tolist() for epoch in range(4)]
    assert len({tuple(draw) for draw in draws}) == 4
    assert blocks.draw_anchors(np.random.default_rng([0, 2]), generated, 12)[0].tolist() == draws[2]


def test_every_candidate_is_drawn_about_equally_often():
    generated, counts = np.arange(12) >= 2, np.zeros(12)
    random = np.random.default_rng(0)
    for _ in range(3000):
        anchors, taken = blocks.draw_anchors(random, generated, 3)
        counts[anchors[taken]] += 1
    assert not counts[[0, 1, 11]].any()
    np.testing.assert_allclose(counts[2:11], 1000, rtol=0.1)


def test_block_positions_learn_the_generated_tokens_that_stand_there():
    random = np.random.default_rng(0)
    token_ids = random.integers(0, 50, (3, 11))
    generated = np.array([[0] * 3 + [1] * 8, [0] * 2 + [1] * 5 + [0] * 4, [1] * 11], bool)
    anchors = np.array([[3, 9], [2, 5], [0, 10]])
    labels, counts = blocks.block_labels(jnp.asarray(token_ids), jnp.asarray(generated), jnp.asarray(anchors), 4)
    assert labels.shape == counts.shape == (3, 2, 4)
    for row, block, position in np.ndindex(3, 2, 4):
        at = anchors[row, block] + position
        wanted = position > 0 and at < 11 and bool(generated[row, at])
        assert bool(counts[row, block, position]) == wanted
        if wanted:
            assert labels[row, block, position] == token_ids[row, at]
    assert counts.sum() == 3 + 1 + 3 + 1 + 3


@pytest.mark.parametrize("decay", [2.0, 4.0, 7.0])
def test_position_weights_are_the_papers(decay):
    weights = blocks.position_weights(8, decay)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, [0, *np.exp([-k / decay for k in range(7)])], rtol=1e-6)


@pytest.mark.parametrize(("block_size", "decay"), [(8, 4.0), (10, 5.0), (16, 7.0)])
def test_the_default_decay_is_the_papers(block_size, decay):
    assert blocks.default_decay(block_size) == decay


TAPPED = {
    "gpt-oss-20b": (24, 5, [1, 6, 11, 16, 21]),
    "gpt-oss-120b": (36, 5, [1, 9, 17, 25, 33]),
    "the tiny target": (4, 3, [0, 1, 2]),
    "one layer": (24, 1, [12]),
    "one of two layers": (2, 1, [0]),
    "all but the last": (6, 5, [0, 1, 2, 3, 4]),
}


@pytest.mark.parametrize(("num_layers", "count", "wanted"), TAPPED.values(), ids=TAPPED.keys())
def test_the_default_layers_to_tap_are_the_published_ones(num_layers, count, wanted):
    assert blocks.default_tapped_layers(num_layers, count) == wanted


def test_default_layers_are_distinct_and_never_the_last():
    for num_layers in range(2, 40):
        for count in range(1, num_layers):
            tapped = blocks.default_tapped_layers(num_layers, count)
            assert tapped == sorted(set(tapped))
            assert len(tapped) == count
            assert 0 <= tapped[0] <= tapped[-1] < num_layers - 1


def test_more_layers_than_can_be_tapped_are_refused():
    with pytest.raises(PipelineError, match="4 layers are to be tapped; a target of 4 layers has 3 for that"):
        blocks.default_tapped_layers(4, 4)
