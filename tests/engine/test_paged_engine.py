"""Pages under an engine: shared, taken away and given back, they change no token and no round."""

import dataclasses

import numpy as np
import pytest

from pipeline.engine.config import EngineConfig
from pipeline.engine.engine import Engine
from pipeline.engine.request import Request
from tests.support import fitted as fitted_draft

pytestmark = pytest.mark.usefixtures("compiled_quickly")

MAX_LENGTH, CHUNK, PAGE, ANSWER = 112, 16, 16, 24
NO_STOPS = (-1, -2)


@pytest.fixture(scope="module")
def models():
    return fitted_draft.fitted()


def make(models, draft=None, *, num_slots=4, **values):
    config = EngineConfig(
        num_slots=num_slots,
        max_length=MAX_LENGTH,
        prefill_chunk=CHUNK,
        page_size=PAGE,
        stop_token_ids=NO_STOPS,
        **values,
    )
    return Engine(models.target, draft, config)


def request(name, prompt, count=ANSWER):
    return Request(request_id=str(name), prompt_ids=tuple(prompt), max_new_tokens=count)


def answers_of(engine, requests):
    return {one.request_id: (one.token_ids, one.accepted_per_round) for one in engine.generate(requests)}


@pytest.fixture(scope="module")
def requests(models):
    """Prompts of which many begin alike: with 40 equal tokens, or as a conversation whose next turn adds to it."""
    random = np.random.default_rng(0)
    system = random.integers(0, 90, 40).tolist()
    plain = [request(f"alone {i}", prompt[:60]) for i, prompt in enumerate(models.prompts[:8])]
    alike = [request(f"alike {i}", [*system, *random.integers(0, 90, i).tolist()]) for i in range(1, 9)]
    return [*plain, *alike]


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "DFLASH"])
def arm(request, models):
    return models.draft if request.param else None


@pytest.fixture(scope="module")
def expected(models, arm, requests):
    """Without reuse, and with pages for all slots."""
    return answers_of(make(models, arm), requests)


def test_reused_prefixes_change_no_token_and_no_round(models, arm, requests, expected):
    engine = make(models, arm, reuse_prefixes=True)
    assert answers_of(engine, requests) == expected
    once = engine.times.reused_tokens
    assert once >= 7 * 32  # two pages of 40 tokens, by all but the first
    assert answers_of(engine, requests) == expected
    assert engine.times.reused_tokens > 2 * once
    assert engine.num_free_pages == engine.num_pages


def test_a_second_turn_reuses_the_first_ones_prompt_and_answer(models, arm):
    engine = make(models, arm, reuse_prefixes=True)
    prompt = models.prompts[3][:20]
    first = answers_of(engine, [request("first", prompt, 40)])["first"][0]
    again = [*prompt, *first, 1, 2, 3]
    second = request("second", again)
    wanted = answers_of(make(models, arm), [second])
    assert engine.times.reused_tokens == 0
    assert answers_of(engine, [second]) == wanted
    committed = len(prompt) + len(first) - 1  # the last token of an answer is in no cache
    assert engine.times.reused_tokens == committed // PAGE * PAGE


def test_one_prompt_of_many_requests_is_computed_once(models, arm):
    prompt = np.random.default_rng(1).integers(0, 90, 70).tolist()
    many = [request(index, [*prompt, index]) for index in range(12)]
    engine = make(models, arm, reuse_prefixes=True)
    found = answers_of(engine, many)
    assert engine.times.prefill_tokens == 71 + 11 * (71 - 64)
    assert found == answers_of(make(models, arm), many)


def test_preempted_requests_go_on_with_the_same_tokens_and_rounds(models, arm, requests, expected):
    engine = make(models, arm, cache_tokens=MAX_LENGTH + PAGE)
    assert answers_of(engine, requests) == expected
    assert engine.num_preempted > 3
    assert engine.num_free_pages == engine.num_pages
    engine = make(models, arm, cache_tokens=MAX_LENGTH + PAGE, reuse_prefixes=True)
    assert answers_of(engine, requests) == expected
    assert engine.num_preempted > 0


def test_steps_of_fewer_rows_change_no_token_and_no_round(models, arm, requests, expected, monkeypatch):
    """With pages for few, so that slots come and go; every number of rows is used."""
    counts = []
    engine = make(models, arm, cache_tokens=MAX_LENGTH + PAGE, reuse_prefixes=True, row_counts=(1, 2))
    dispatch = engine._dispatch_round
    monkeypatch.setattr(engine, "_dispatch_round", lambda rows, size: counts.append(rows.count) or dispatch(rows, size))
    assert answers_of(engine, requests) == expected
    assert set(counts) == {1, 2, engine.config.num_slots}
    assert engine.num_free_pages == engine.num_pages


def test_the_oldest_request_is_never_the_one_that_waits(models, arm):
    engine = make(models, arm, cache_tokens=MAX_LENGTH + PAGE)
    prompts = [prompt[:20] for prompt in models.prompts[:4]]
    finished = [one.request_id for one in engine.generate([request(i, p, 80) for i, p in enumerate(prompts)])]
    assert engine.num_preempted > 0
    assert finished == ["0", "1", "2", "3"]


def test_a_long_prompt_does_not_stop_running_answers(models, arm):
    engine = make(models, arm, num_slots=2, step_tokens=CHUNK)
    engine.add(request("running", models.prompts[0][:4], 60))
    while not any(update.num_accepted is None for update in engine.step()):
        pass
    engine.step()
    engine.add(request("long", np.random.default_rng(2).integers(0, 90, 80).tolist(), 4))
    names = []
    while "long" not in names:
        updates = [update.request_id for update in engine.step()]
        assert "running" in updates
        names += updates
    assert names.count("running") >= 80 // CHUNK


def test_a_short_prompt_waits_for_no_more_than_a_chunk_of_a_long_one(models, arm):
    engine = make(models, arm, num_slots=4, step_tokens=CHUNK)
    random = np.random.default_rng(3)
    for index in range(3):
        engine.add(request(f"long {index}", random.integers(0, 90, 90).tolist(), 4))
    for _ in range(3):
        engine.step()
    engine.add(request("short", [5, 6, 7], 4))
    engine.step()  # computes its only chunk
    assert "short" in {update.request_id for update in engine.step()}
    assert engine.num_running == 4
    everyone = {update.request_id for _ in range(40) for update in engine.step()}
    assert len(everyone) == 4


def test_a_token_is_known_one_step_after_it_was_dispatched(models, arm):
    engine = make(models, arm, num_slots=1)
    engine.add(request("only", models.prompts[0][:4], 60))
    assert [len(update.token_ids) for update in engine.step()] == [1]
    for _ in range(5):
        assert len(engine.step()) == 1
    engine.cancel("only")
    assert not engine.has_work
    assert engine.step() == []
    assert engine.num_free_pages == engine.num_pages


def test_whoever_comes_and_goes_where_pages_are_short_every_answer_is_right(models, arm, requests, expected):
    random = np.random.default_rng(4)
    engine = make(models, arm, cache_tokens=MAX_LENGTH + PAGE, reuse_prefixes=True)
    open_requests, tokens, cancelled, number = {}, {}, 0, 0
    finished = 0
    while number < 120 or engine.has_work:
        if number < 120 and random.random() < 0.5:
            original = requests[int(random.integers(len(requests)))]
            one = dataclasses.replace(original, request_id=f"{number} {original.request_id}")
            engine.add(one)
            open_requests[one.request_id] = original.request_id
            tokens[one.request_id] = ()
            number += 1
        if open_requests and random.random() < 0.05:
            name = sorted(open_requests)[int(random.integers(len(open_requests)))]
            engine.cancel(name)
            del open_requests[name]
            cancelled += 1
        for update in engine.step():
            tokens[update.request_id] += update.token_ids
            if update.finish_reason is not None:
                assert tokens[update.request_id] == expected[open_requests.pop(update.request_id)][0]
                finished += 1
    assert finished + cancelled == 120
    assert min(finished, cancelled) > 20
    assert engine.num_preempted > 0
    assert engine.num_free_pages == engine.num_pages
