"""The engine against a loop without caches, slots or drafts: whatever comes and goes, the tokens are the target's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipeline.dflash.acceptance import Acceptance
from pipeline.engine import layout
from pipeline.engine.config import EngineConfig
from pipeline.engine.engine import Engine
from pipeline.engine.in_flight import EngineTimes
from pipeline.engine.request import Completion, Request
from pipeline.errors import PipelineError
from pipeline.model.dflash import weights as dflash_weights
from pipeline.model.dflash.model import DraftModel
from pipeline.model.gpt_oss import forward as gpt_oss
from tests.support import fitted as fitted_draft

pytestmark = pytest.mark.usefixtures("compiled_quickly")

MAX_LENGTH, PREFILL_CHUNK = 90, 8
LONGEST_ANSWER = 48
BUDGETS = (1, 2, 3, 5, 9, 24, LONGEST_ANSWER)
NO_STOPS = (-1, -2)  # as many as the real ones: the same programs run


@pytest.fixture(scope="module")
def models():
    return fitted_draft.fitted()


@pytest.fixture(scope="module")
def gold(models):
    """The target's greedy continuation of every prompt, by the whole forward for each token."""
    prompts = models.prompts
    rows = np.zeros((len(prompts), MAX_LENGTH), np.int32)
    lengths = np.array([len(prompt) for prompt in prompts])
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = prompt

    @jax.jit
    def following(target, rows, lengths):
        hidden = gpt_oss.forward(target, rows, jnp.zeros(len(rows), jnp.int32), None).hidden
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return gpt_oss.logits(target.weights, last).argmax(-1)

    for count in range(LONGEST_ANSWER):
        rows[np.arange(len(rows)), lengths + count] = following(models.target, rows, lengths + count)
    return [tuple(row[length : length + LONGEST_ANSWER].tolist()) for row, length in zip(rows, lengths, strict=True)]


def random_draft(models):
    config = models.draft.config
    return DraftModel(config, dflash_weights.random_weights(config, jax.random.key(0)))


def make(models, draft, slots, stops=fitted_draft.STOP_TOKEN_IDS):
    config = EngineConfig(
        num_slots=slots, max_length=MAX_LENGTH, prefill_chunk=PREFILL_CHUNK, stop_token_ids=tuple(stops)
    )
    return Engine(models.target, draft, config)


def requests_of(models, budgets=BUDGETS):
    return [
        Request(request_id=f"request-{index}", prompt_ids=tuple(prompt), max_new_tokens=budgets[index % len(budgets)])
        for index, prompt in enumerate(models.prompts)
    ]


def cut(tokens, budget, stops):
    """A continuation as it must be answered: ended by its first stop token or by its budget."""
    ends = [index + 1 for index, token in enumerate(tokens) if token in stops]
    return tokens[: min([budget, *ends])]


def require_gold(answers, requests, gold, stops=fitted_draft.STOP_TOKEN_IDS):
    """Every request was answered, by the target's own tokens, with the right reason."""
    assert sorted(answer.request_id for answer in answers) == sorted(request.request_id for request in requests)
    budgets = {request.request_id: request.max_new_tokens for request in requests}
    for answer in answers:
        text = gold[int(answer.request_id.rsplit("-", 1)[1])]
        wanted = cut(text, budgets[answer.request_id], stops)
        assert answer.token_ids == wanted, answer.request_id
        assert answer.finish_reason == ("stop" if wanted[-1] in stops else "length"), answer.request_id


def test_the_prompts_reach_past_a_chunk_and_past_the_window_and_answers_end_in_both_ways(models, gold):
    lengths = [len(prompt) for prompt in models.prompts]
    assert min(lengths) == 1
    assert max(lengths) > 4 * PREFILL_CHUNK
    assert np.median(lengths) > models.target.config.sliding_window
    stopped = [any(token in fitted_draft.STOP_TOKEN_IDS for token in tokens) for tokens in gold]
    assert any(stopped)
    assert not all(stopped)


DRAFTS = {"plain": lambda models: None, "random draft": random_draft, "fitted draft": lambda models: models.draft}


@pytest.mark.parametrize("slots", [1, 3, 5])
@pytest.mark.parametrize("draft", DRAFTS.values(), ids=DRAFTS.keys())
def test_answers_are_the_targets_greedy_text(models, gold, monkeypatch, draft, slots):
    if slots == 5:  # prompts that come together are prefilled in portions
        monkeypatch.setattr(layout, "PREFILL_ROWS", 2)
    engine, requests = make(models, draft(models), slots), requests_of(models)
    require_gold(list(engine.generate(requests)), requests, gold)
    assert not engine.has_work


@pytest.fixture(scope="module")
def decoded(models):
    """Every prompt's answer of full length, with its rounds, and the engine that gave them."""
    engine = make(models, models.draft, 3, NO_STOPS)
    answers = list(engine.generate(requests_of(models, (LONGEST_ANSWER,))))
    return engine, {answer.request_id: answer for answer in answers}


def test_rounds_of_every_size_were_committed_and_rolled_back(decoded, gold):
    engine, answers = decoded
    accepted = [count for answer in answers.values() for count in answer.accepted_per_round]
    assert set(accepted) == set(range(fitted_draft.BLOCK_SIZE))
    assert engine.acceptance == Acceptance.of(accepted, fitted_draft.BLOCK_SIZE)
    for answer in answers.values():
        assert answer.token_ids == gold[int(answer.request_id.rsplit("-", 1)[1])]
        assert sum(count + 1 for count in answer.accepted_per_round) == LONGEST_ANSWER - 1


def ends_inside_rounds(answers):
    """Stop tokens that would end an answer within a round, before its last token: (request, token, position)."""
    for name, answer in answers.items():
        at = 1
        for accepted in answer.accepted_per_round:
            for index in range(at, at + accepted):
                if answer.token_ids[index] not in answer.token_ids[:index]:
                    yield name, answer.token_ids[index], index, index - at
            at += accepted + 1


@pytest.mark.parametrize("depth", range(fitted_draft.BLOCK_SIZE - 2))
def test_a_stop_token_inside_an_accepted_run_ends_the_answer_there(models, decoded, gold, depth):
    _, answers = decoded
    found = [place for place in ends_inside_rounds(answers) if place[3] == depth]
    assert found
    name, token, index, _ = found[0]
    stops = (token, -1)
    engine = make(models, models.draft, 3, stops)
    requests = requests_of(models, (LONGEST_ANSWER,))
    again = {answer.request_id: answer for answer in engine.generate(requests)}
    require_gold(list(again.values()), requests, gold, stops)
    ended = again[name]
    assert len(ended.token_ids) == index + 1
    assert ended.finish_reason == "stop"
    before = answers[name].accepted_per_round[: len(ended.accepted_per_round) - 1]
    assert ended.accepted_per_round == (*before, depth)  # the round counts as what it yielded


@pytest.mark.parametrize("budget", BUDGETS)
def test_no_answer_overshoots_its_length(models, decoded, gold, budget):
    engine = make(models, models.draft, 3, NO_STOPS)
    requests = requests_of(models, (budget,))
    answers = list(engine.generate(requests))
    assert {len(answer.token_ids) for answer in answers} == {budget}
    require_gold(answers, requests, gold, NO_STOPS)
    assert all(sum(count + 1 for count in answer.accepted_per_round) == budget - 1 for answer in answers)


def test_a_whole_row_may_be_filled_to_its_last_position(models, gold):
    prompt = tuple(models.prompts[1])
    room = MAX_LENGTH - len(prompt)
    request = Request(request_id="request-1", prompt_ids=prompt, max_new_tokens=room)
    plain, drafted = (next(make(models, draft, 3, NO_STOPS).generate([request])) for draft in (None, models.draft))
    assert len(plain.token_ids) == room
    assert plain.token_ids == drafted.token_ids
    assert plain.token_ids[:LONGEST_ANSWER] == gold[1][:room]


@pytest.mark.parametrize("draft", [None, "fitted"], ids=["plain", "DFLASH"])
def test_counters_are_the_sums_over_answers(models, draft):
    engine, requests = make(models, draft and models.draft, 3), requests_of(models)
    answers = list(engine.generate(requests))
    accepted = [count for answer in answers for count in answer.accepted_per_round]
    if draft:
        assert engine.acceptance == Acceptance.of(accepted, fitted_draft.BLOCK_SIZE)
    else:
        assert accepted == []
        assert engine.acceptance.num_rounds == 0
    times = engine.times
    assert times.prefill_tokens == sum(len(request.prompt_ids) for request in requests)
    assert times.decode_tokens == sum(len(answer.token_ids) - 1 for answer in answers)  # the first is prefill's
    assert times.prefill_seconds > 0 < times.decode_seconds


def compiled(engine):
    used = engine._steps
    rounds = used.dflash_round(engine.block_size or 1)
    return [one._cache_size() for one in (used.prefill, used.plain_step, rounds)]


@pytest.mark.parametrize("draft", [None, "fitted"], ids=["plain", "DFLASH"])
def test_nothing_compiles_while_requests_come_and_go(models, gold, draft):
    engine = make(models, draft and models.draft, 4)  # a number of slots that no other test has
    before = compiled(engine)
    engine.warm_up()
    warm = compiled(engine)
    assert sum(warm) == sum(before) + 3  # one prompt, several prompts, and the round
    assert engine.times == EngineTimes()
    assert engine.acceptance.num_rounds == 0
    requests = requests_of(models)
    answers, cancelled = drive(engine, requests, np.random.default_rng(0))
    assert compiled(engine) == warm
    assert len(cancelled) > 2
    require_gold(answers, [request for request in requests if request.request_id not in cancelled], gold)


def drive(engine, requests, random):
    """Add requests at random moments and cancel some, waiting or running; the finished answers and the cancelled."""
    coming, tokens, accepted, answers, cancelled = list(requests), {}, {}, [], set()
    live = []
    while coming or engine.has_work:
        for request in coming[: (more := int(random.integers(0, 4)))]:
            engine.add(request)
            live.append(request.request_id)
            tokens[request.request_id], accepted[request.request_id] = (), ()
        del coming[:more]
        if live and random.random() < 0.15:
            victim = live.pop(int(random.integers(len(live))))
            engine.cancel(victim)
            cancelled.add(victim)
        for update in engine.step():
            name = update.request_id
            assert name in live, f"{name} was cancelled and goes on"
            tokens[name] += update.token_ids
            if update.num_accepted is not None:
                accepted[name] += (update.num_accepted,)
            if update.finish_reason is not None:
                live.remove(name)
                answers.append(
                    Completion(
                        request_id=name,
                        token_ids=tokens[name],
                        finish_reason=update.finish_reason,
                        accepted_per_round=accepted[name],
                    )
                )
    return answers, cancelled


@pytest.mark.parametrize("draft", [None, "fitted"], ids=["plain", "DFLASH"])
def test_a_cancelled_request_leaves_its_slot_as_good_as_new(models, gold, draft):
    engine = make(models, draft and models.draft, 1)
    requests = requests_of(models, (LONGEST_ANSWER,))
    long, waiting, *others = [request for request in requests if len(gold_answer(gold, request)) > 20][:6]
    for request in (long, waiting):
        engine.add(request)
    for _ in range(3):
        assert {update.request_id for update in engine.step()} == {long.request_id}
    assert (engine.num_running, engine.num_waiting) == (1, 1)
    engine.cancel(waiting.request_id)
    assert (engine.num_running, engine.num_waiting) == (1, 0)
    engine.cancel(long.request_id)
    assert not engine.has_work
    assert engine.step() == []
    engine.cancel("nobody")
    again = [*others, waiting, long]  # names that were cancelled may come again
    require_gold(list(engine.generate(again)), again, gold)


def gold_answer(gold, request):
    index = int(request.request_id.rsplit("-", 1)[1])
    return cut(gold[index], request.max_new_tokens, fitted_draft.STOP_TOKEN_IDS)


REFUSED = {
    "empty prompt": ((), 3, "prompt has 0 tokens and max_new_tokens is 3; both must be at least 1"),
    "nothing wanted": ((1, 2), 0, "prompt has 2 tokens and max_new_tokens is 0"),
    "too long": ((1,) * 80, 11, "prompt has 80 tokens and 11 more are wanted, 91 in all; the engine holds 90"),
    "unknown token": ((1, 98, -1), 2, r"prompt has token ids \[98, -1\]; the target knows 0..97"),
    "name in use": ((1, 2), 2, "request id 'used' is already in use"),
}


@pytest.mark.parametrize(("prompt", "budget", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_request_that_cannot_run_is_refused_with_the_numbers(models, prompt, budget, message):
    engine = make(models, None, 1)
    engine.add(Request(request_id="used", prompt_ids=(1,), max_new_tokens=1))
    name = "used" if "in use" in message else "new"
    with pytest.raises(PipelineError, match=message):
        engine.add(Request(request_id=name, prompt_ids=prompt, max_new_tokens=budget))
    assert engine.num_waiting == 1


def test_more_positions_than_the_target_has_are_refused(models):
    config = dataclasses.replace(make(models, None, 1).config, max_length=257)
    with pytest.raises(PipelineError, match="max_length is 257; the target has 256 positions"):
        Engine(models.target, None, config)
