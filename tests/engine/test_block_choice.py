"""Which block size pays: a rule of numbers, and an engine that changes it while it decodes."""

import itertools

import jax
import numpy as np
import pytest

from pipeline.engine.block_choice import FIRST_ROUNDS, PROBE_EVERY, BlockChoice
from pipeline.engine.config import EngineConfig
from pipeline.engine.engine import Engine
from pipeline.engine.request import Request
from pipeline.engine.step_rows import rows_for
from pipeline.errors import PipelineError
from pipeline.model.dflash import weights as dflash_weights
from pipeline.model.dflash.model import DraftModel
from tests.support import fitted as fitted_draft

SECONDS = {1: 1.0, 4: 2.0, 8: 3.0}


def run(choice, accepts, rounds, seconds=SECONDS, slots=1):
    """The sizes of a number of rounds, of which a block of infinite size would have accepted `accepts()` tokens."""
    sizes = []
    for _ in range(rounds):
        size = choice.choose()
        choice.took(size, seconds[size])
        choice.accepted(size, [min(accepts(), size - 1) for _ in range(slots)])
        sizes.append(size)
    return sizes


def timed(sizes=(1, 4, 8)):
    choice = BlockChoice(sizes)
    for size in sizes:
        choice.took(size, SECONDS[size])
    return choice


@pytest.mark.parametrize(("accepted", "best"), [(0, 1), (3, 4), (7, 8)])
def test_the_size_that_yields_most_a_second_is_found_and_used(accepted, best):
    sizes = run(timed(), lambda: accepted, 400)
    assert set(sizes[:FIRST_ROUNDS]) == {8}
    assert sizes[FIRST_ROUNDS + 2 :].count(best) > 0.98 * (400 - FIRST_ROUNDS)


def test_what_a_smaller_block_would_have_accepted_follows_from_larger_ones():
    random = np.random.default_rng(0)
    choice = timed()
    run(choice, lambda: int(random.integers(0, 8)), FIRST_ROUNDS, slots=200)
    found = {size: one.accept_length for size, one in choice.estimates().items()}
    wanted = {size: 1 + np.minimum(np.arange(8), size - 1).mean() for size in (1, 4, 8)}
    assert found == pytest.approx(wanted, rel=0.05)


def test_requests_that_become_easier_are_noticed():
    random = np.random.default_rng(1)
    choice = timed()
    assert run(choice, lambda: 0, 300)[-1] == 1
    sizes = run(choice, lambda: 7 if random.random() < 0.95 else 0, 40 * PROBE_EVERY)
    assert sizes[-1] == 8


def test_trying_other_sizes_costs_little():
    sizes = run(timed(), lambda: 0, 4000)[300:]
    assert sum(SECONDS[size] for size in sizes) < 1.02 * len(sizes)


def test_one_slow_round_changes_nothing():
    choice = timed()
    run(choice, lambda: 7, 100)
    choice.took(8, 100.0)
    assert choice.choose() == 8


def test_one_size_is_always_used():
    assert set(run(BlockChoice((8,)), lambda: 0, 500)) == {8}
    with pytest.raises(ValueError, match="no block size"):
        BlockChoice(())


MAX_LENGTH, ANSWER = 90, 40


@pytest.fixture(scope="module")
def models():
    return fitted_draft.fitted()


def make(models, draft, sizes=(), slots=3):
    config = EngineConfig(
        num_slots=slots, max_length=MAX_LENGTH, prefill_chunk=16, page_size=16, block_sizes=sizes, reuse_prefixes=True
    )
    return Engine(models.target, draft, config)


def answers_of(engine, models):
    requests = [
        Request(request_id=str(index), prompt_ids=tuple(prompt), max_new_tokens=ANSWER)
        for index, prompt in enumerate(models.prompts[:12])
    ]
    return {one.request_id: one.token_ids for one in engine.generate(requests)}


def choice_of(engine):
    """Of rounds over all slots."""
    return engine._counts._choices[engine.config.num_slots]


@pytest.fixture(scope="module")
def plain(models):
    return answers_of(make(models, None), models)


@pytest.mark.usefixtures("compiled_quickly")
@pytest.mark.parametrize("pattern", [(1,), (1, 1, 1, 6), (3, 1, 6, 6), (1,) * 40 + (6, 3)], ids=str)
def test_whatever_the_sizes_the_tokens_are_plain_decodings(models, plain, pattern, monkeypatch):
    engine = make(models, models.draft, (1, 3, 6))
    monkeypatch.setattr(choice_of(engine), "choose", itertools.cycle(pattern).__next__)
    assert answers_of(engine, models) == plain
    sizes = {size for size in pattern if size > 1}
    assert set(engine.smaller_blocks) == sizes - {6}
    assert (engine.acceptance.num_rounds > 0) == (6 in sizes)


def test_features_that_were_set_aside_become_the_context_that_rounds_make(models, monkeypatch):
    """The draft's cache after plain steps and a round is that of rounds alone."""
    caches = []
    for pattern in ((6,), (1,) * 21 + (6,)):
        engine = make(models, models.draft, (1, 6), slots=1)
        monkeypatch.setattr(choice_of(engine), "choose", itertools.cycle(pattern).__next__)
        engine.add(Request(request_id="only", prompt_ids=tuple(models.prompts[2][:9]), max_new_tokens=80))
        tokens = []
        while len(tokens) < 60:
            for update in engine.step():
                tokens += update.token_ids
        engine._dispatch_round(rows_for({}, (), 1, 1), 6)  # whatever is set aside goes to the cache
        pages = engine._pages.row_tables(0)[0, :4]
        caches.append([np.asarray(layer.entries)[pages] for layer in engine._state.draft_cache.layers])
    for rounds, deferred in zip(*caches, strict=True):
        flat = [np.moveaxis(one, 2, 1).reshape(64, -1)[:60] for one in (rounds, deferred)]
        np.testing.assert_allclose(*flat, rtol=0, atol=2e-5)


@pytest.mark.usefixtures("compiled_quickly")
def test_with_a_random_draft_decoding_becomes_plain(models, plain):
    config = models.draft.config
    draft = DraftModel(config, dflash_weights.random_weights(config, jax.random.key(0)))
    engine = make(models, draft, (1, 4))
    engine.warm_up()
    for size, seconds in ((1, 0.001), (4, 0.003), (6, 0.004)):
        for _ in range(9):
            choice_of(engine).took(size, seconds)
    choice_of(engine).took = lambda size, seconds: None  # times of this machine would decide
    assert answers_of(engine, models) == plain
    assert engine.acceptance.num_rounds < 12 * FIRST_ROUNDS
    assert set(engine.block_estimates) == {1, 4, 6}


def test_a_fixed_size_that_the_draft_does_not_have_is_refused(models):
    with pytest.raises(PipelineError, match="block_size is 8; the draft has blocks of 2 to 6"):
        make(models, models.draft, (8,))
