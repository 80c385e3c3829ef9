"""Sampled answers against a loop without caches and slots: a request's tokens are its own, whatever runs beside it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipeline.engine.config import EngineConfig
from pipeline.engine.engine import Engine
from pipeline.engine.in_flight import EngineTimes
from pipeline.engine.request import Request
from pipeline.engine.sampling_params import SamplingParams
from pipeline.errors import PipelineError
from pipeline.model.gpt_oss import forward as gpt_oss
from pipeline.model.gpt_oss.config import GptOssConfig
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.gpt_oss.weights import random_weights
from pipeline.model.layers.sampling import sampling_key
from tests.support import fitted as fitted_draft
from tests.support import models as tiny_models
from tests.support.random_draft import random_draft

pytestmark = pytest.mark.usefixtures("compiled_quickly")

CONFIG = GptOssConfig.from_hf(tiny_models.LEGACY_TARGET)
MAX_LENGTH, PREFILL_CHUNK, LONGEST = 60, 8, 20
STOPS = (5, 71)
TEMPERATURE, TOP_P = 0.8, 0.9
SEED = 3


def drawn(seed, name):
    return SamplingParams(temperature=TEMPERATURE, top_p=TOP_P, key=sampling_key(seed, name))


@pytest.fixture(scope="module")
def target():
    random = np.random.default_rng(1)
    made = jax.jit(lambda key: random_weights(CONFIG, key))(jax.random.key(0))
    noisy = jax.tree.map(lambda leaf: leaf + jnp.asarray(0.3 * random.normal(size=leaf.shape), leaf.dtype), made)
    return TargetModel(CONFIG, noisy)


@pytest.fixture(scope="module")
def requests():
    random = np.random.default_rng(2)
    return [
        Request(
            request_id=str(index),
            prompt_ids=tuple(int(token) for token in random.integers(0, CONFIG.vocab_size, 1 + 3 * index)),
            max_new_tokens=LONGEST - index,
            sampling=drawn(SEED, f"prompt {index}"),
        )
        for index in range(9)
    ]


def chosen(logits, key, position):
    """numpy's argmax over the nucleus, found by sorting, of logits and noise from JAX's random bits."""
    scaled = logits.astype(np.float64) / TEMPERATURE
    order = np.argsort(-scaled)
    weights = np.exp(scaled - scaled.max())
    weights /= weights.sum()
    nucleus = order[np.cumsum(weights[order]) - weights[order] < TOP_P]
    here = jax.random.fold_in(jax.random.wrap_key_data(np.array(key, np.uint32), impl="threefry2x32"), position)
    uniform = (np.asarray(jax.random.bits(here, logits.shape), np.float64) + 0.5) / 2**32
    return int(nucleus[np.argmax((scaled - np.log(-np.log1p(-uniform)))[nucleus])])


@pytest.fixture(scope="module")
def gold(target, requests):
    """Every request's answer, by the whole forward for each token."""

    @jax.jit
    def following(tokens, length):
        hidden = gpt_oss.forward(target, tokens, jnp.zeros(1, jnp.int32), None).hidden
        return gpt_oss.logits(target.weights, hidden[0, length - 1])

    answers = {}
    for request in requests:
        text = list(request.prompt_ids)
        while len(text) < len(request.prompt_ids) + request.max_new_tokens and (
            len(text) == len(request.prompt_ids) or text[-1] not in STOPS
        ):
            padded = np.zeros((1, MAX_LENGTH), np.int32)
            padded[0, : len(text)] = text
            text.append(chosen(np.asarray(following(padded, len(text))), request.sampling.key, len(text)))
        answers[request.request_id] = tuple(text[len(request.prompt_ids) :])
    return answers


def make(target, slots, draft=None, prefill_chunk=PREFILL_CHUNK, **values):
    config = EngineConfig(
        num_slots=slots,
        max_length=MAX_LENGTH,
        prefill_chunk=prefill_chunk,
        page_size=16,
        stop_token_ids=STOPS,
        samples=True,
        **values,
    )
    return Engine(target, draft, config)


def answers_of(engine, requests):
    return {one.request_id: one.token_ids for one in engine.generate(requests)}


def test_the_answers_are_of_both_endings_and_not_greedys(target, requests, gold):
    greedy = answers_of(
        make(target, 3),
        [Request(request_id=one.request_id, prompt_ids=one.prompt_ids, max_new_tokens=LONGEST) for one in requests],
    )
    assert sum(greedy[name][: len(answer)] != answer for name, answer in gold.items()) > len(gold) / 2
    assert len({answer[-1] in STOPS for answer in gold.values()}) == 2


def test_answers_do_not_depend_on_slots_order_company_or_chunks(target, requests, gold):
    assert answers_of(make(target, 1, prefill_chunk=5), requests) == gold
    assert answers_of(make(target, 3), requests) == gold
    assert answers_of(make(target, 3), requests[::-1]) == gold
    assert answers_of(make(target, 3), requests[4:6]) == {name: gold[name] for name in "45"}
    renamed = [Request(**{**vars(one), "request_id": f"other {one.request_id}"}) for one in requests]
    assert answers_of(make(target, 3), renamed) == {f"other {name}": answer for name, answer in gold.items()}


def test_another_seed_gives_other_answers(target, requests, gold):
    again = [Request(**{**vars(one), "sampling": drawn(4, one.request_id)}) for one in requests]
    found = answers_of(make(target, 3), again)
    assert sum(found[name] != answer for name, answer in gold.items()) > len(gold) / 2


def test_equal_prompts_with_equal_keys_give_one_answer_and_with_others_others(target):
    names = {"a": "x", "b": "y", "c": "x"}
    requests = [
        Request(request_id=name, prompt_ids=(3, 9, 27), max_new_tokens=12, sampling=drawn(0, key))
        for name, key in names.items()
    ]
    found = answers_of(make(target, 3), requests)
    assert found["a"] == found["c"] != found["b"]


def test_nothing_compiles_after_warming_up(target, requests, gold):
    engine = make(target, 4)
    engine.warm_up()
    assert engine.times == EngineTimes()
    sizes = [one._cache_size() for one in (engine._steps.prefill, engine._steps.plain_step)]
    assert answers_of(engine, requests) == gold
    assert [one._cache_size() for one in (engine._steps.prefill, engine._steps.plain_step)] == sizes


@pytest.fixture(scope="module")
def draft():
    """A draft that knows nothing."""
    return random_draft(CONFIG)


@pytest.mark.parametrize("temperature", [1e-38, 0.2, 1.0])
def test_what_a_good_draft_proposes_is_accepted_where_the_target_draws_it(temperature):
    """Blocks of every size are accepted, and the texts are those that the target draws alone."""
    models = fitted_draft.fitted()
    requests = [
        Request(
            request_id=str(index),
            prompt_ids=tuple(prompt),
            max_new_tokens=30,
            sampling=SamplingParams(temperature=temperature, top_k=20, key=sampling_key(index, "text")),
        )
        for index, prompt in enumerate(models.prompts[:12])
    ]
    config = EngineConfig(num_slots=4, max_length=90, prefill_chunk=16, page_size=16, samples=True)
    wanted = answers_of(Engine(models.target, None, config), requests)
    engine = Engine(models.target, models.draft, config)
    assert answers_of(engine, requests) == wanted
    assert engine.acceptance.num_accepted > 10


def test_a_draft_changes_no_drawn_token(target, draft, requests, gold):
    """The same seeds give the same texts, whatever is proposed."""
    engine = make(target, 3, draft)
    assert answers_of(engine, requests) == gold
    assert engine.acceptance.num_rounds > 20


def test_neither_pages_nor_preemption_nor_block_sizes_change_a_drawn_token(target, draft, requests, gold):
    engine = make(target, 3, draft, cache_tokens=64, reuse_prefixes=True, block_sizes=(1, 2, 4), row_counts=(1, 2))
    assert answers_of(engine, requests) == gold
    assert answers_of(engine, requests) == gold


def test_greedy_requests_beside_drawn_ones_are_answered_as_alone(target, draft, requests, gold):
    greedy = [
        Request(request_id=f"greedy {index}", prompt_ids=one.prompt_ids, max_new_tokens=LONGEST)
        for index, one in enumerate(requests)
    ]
    alone = answers_of(make(target, 3), greedy)
    mixed = answers_of(make(target, 4, draft), [one for pair in zip(greedy, requests, strict=True) for one in pair])
    assert mixed == alone | gold


def reference(target, request, stops=STOPS):
    """A greedy answer with a request's rules, by the whole forward for each token, and its raw log probabilities."""

    @jax.jit
    def following(tokens, length):
        hidden = gpt_oss.forward(target, tokens, jnp.zeros(1, jnp.int32), None).hidden
        return gpt_oss.logits(target.weights, hidden[0, length - 1])

    params, text, found = request.sampling, list(request.prompt_ids), []
    prompt = len(text)
    while len(text) - prompt < request.max_new_tokens and not (len(text) > prompt and text[-1] in stops):
        padded = np.zeros((1, MAX_LENGTH), np.int32)
        padded[0, : len(text)] = text
        raw = np.asarray(following(padded, len(text)), np.float64)
        logits = raw.copy()
        counts = np.bincount(text[prompt:], minlength=len(raw))
        seen = np.bincount(text, minlength=len(raw)) > 0
        logits[seen] = np.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)[
            seen
        ]
        logits -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
        for token, bias in params.logit_bias:
            logits[token] += bias
        if len(text) - prompt < params.min_tokens:
            logits[list(stops)] = -np.inf
        text.append(int(logits.argmax()))
        log_probs = raw - raw.max() - np.log(np.exp(raw - raw.max()).sum())
        found.append((log_probs[text[-1]], log_probs))
    return tuple(text[prompt:]), found


RULES = {
    "repetition": {"repetition_penalty": 1.4},
    "frequency and presence": {"frequency_penalty": 0.9, "presence_penalty": 1.3},
    "negative frequency": {"frequency_penalty": -0.5},
    "bias": {"logit_bias": ((11, 100.0), (12, -100.0)), "frequency_penalty": 2.0, "presence_penalty": 2.0},
    "shortest length": {"min_tokens": 12},
    "other stops": {"stop_token_ids": (3, 9, 40, 41)},
    "no stops": {"stop_token_ids": ()},
}


@pytest.mark.parametrize("with_draft", [False, True], ids=["plain", "DFLASH"])
def test_every_rule_is_followed_at_every_position_beside_all_others(target, draft, with_draft):
    random = np.random.default_rng(5)
    requests = [
        Request(
            request_id=name,
            prompt_ids=tuple(random.integers(0, CONFIG.vocab_size, 4 + index).tolist()),
            max_new_tokens=LONGEST,
            sampling=SamplingParams(**values, logprobs=index),
        )
        for index, (name, values) in enumerate(RULES.items())
    ]
    config = {"cache_tokens": 96} if with_draft else {}  # some are preempted, and penalised for what they had written
    answers = {
        one.request_id: one for one in make(target, 4, draft if with_draft else None, **config).generate(requests)
    }
    for request in requests:
        stops = request.sampling.stop_token_ids
        wanted, log_probs = reference(target, request, STOPS if stops is None else stops)
        answer = answers[request.request_id]
        assert answer.token_ids == wanted, request.request_id
        assert len(answer.log_probs) == len(wanted)
        for found, (chosen, every) in zip(answer.log_probs, log_probs, strict=True):
            assert found.log_prob == pytest.approx(chosen, abs=1e-4)
            best = np.argsort(-every)[: request.sampling.logprobs]
            assert [token for token, _ in found.top] == best.tolist()
            np.testing.assert_allclose([value for _, value in found.top], every[best], atol=1e-4)


REFUSED = {
    "temperature": ({"temperature": -0.1}, "temperature is -0.1; it must be 0 or more"),
    "top_p": ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
    "several": ({"min_p": 2.0, "logprobs": 21}, "min_p is 2.0; it must be from 0 to 1\n  logprobs is 21"),
    "bias": ({"logit_bias": ((3, 101.0),)}, "logit_bias of token 3 is 101.0; it must be from -100 to 100"),
    "stops": ({"stop_token_ids": tuple(range(17))}, "stop_token_ids has 17 tokens; it may have 16"),
    "not a number": ({"temperature": float("nan")}, "temperature is nan"),
}


@pytest.mark.parametrize(("values", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(PipelineError, match=message):
        SamplingParams(**values)


def test_what_the_engine_cannot_do_is_refused_and_requests_go_on(target, requests, gold):
    engine = make(target, 3)
    for request in requests:
        engine.add(request)
    engine.step()
    for values, message in (
        ({"logit_bias": ((CONFIG.vocab_size, 1.0),)}, "logit_bias or stop_token_ids has"),
        ({"min_tokens": 6}, "min_tokens is 6 and max_new_tokens 5"),
    ):
        with pytest.raises(PipelineError, match=message):
            engine.add(Request(request_id="bad", prompt_ids=(1,), max_new_tokens=5, sampling=SamplingParams(**values)))
    greedy = Engine(target, None, EngineConfig(num_slots=1, max_length=MAX_LENGTH, prefill_chunk=8))
    with pytest.raises(PipelineError, match="request '0' asks for more than the most likely tokens"):
        greedy.add(requests[0])
    tokens = {request.request_id: () for request in requests}
    while engine.has_work:
        for update in engine.step():
            tokens[update.request_id] += update.token_ids
    found = {name: text[-len(gold[name]) + 1 :] for name, text in tokens.items() if len(gold[name]) > 1}
    assert all(gold[name][1:] == text for name, text in found.items())


@pytest.mark.parametrize(
    "with_draft", [pytest.param(False, id="plain", marks=pytest.mark.slow), pytest.param(True, id="DFLASH")]
)
def test_log_probabilities_of_prompts_are_those_of_a_whole_forward(target, draft, requests, with_draft):
    """Prompts of 1 to 25 tokens, in chunks of 8, also where their pages are there already, and with few pages."""
    scored = [
        Request(
            request_id=one.request_id,
            prompt_ids=one.prompt_ids,
            max_new_tokens=3,
            sampling=SamplingParams(prompt_logprobs=index % 4),
        )
        for index, one in enumerate(requests)
    ]
    engine = make(target, 3, draft if with_draft else None, cache_tokens=64, reuse_prefixes=True)
    answers_of(engine, requests)
    found = dict.fromkeys(answers_of(engine, requests))
    for one in scored:
        engine.add(one)
    answers = dict.fromkeys(found, ())
    while engine.has_work:
        for update in engine.step():
            assert found[update.request_id] is None or not update.prompt_log_probs
            answers[update.request_id] += update.token_ids
            if found[update.request_id] is None:
                found[update.request_id] = update.prompt_log_probs
    free = [Request(request_id=one.request_id, prompt_ids=one.prompt_ids, max_new_tokens=3) for one in requests]
    assert answers == answers_of(make(target, 3), free)
    for index, one in enumerate(scored):
        tokens = np.array(one.prompt_ids, np.int32)
        hidden = gpt_oss.forward(target, jnp.asarray(tokens[None]), jnp.zeros(1, jnp.int32), None).hidden
        wanted = np.asarray(jax.nn.log_softmax(gpt_oss.logits(target.weights, hidden[0])))[:-1]
        assert [each.token_id for each in found[one.request_id]] == tokens[1:].tolist()
        chosen = [each.log_prob for each in found[one.request_id]]
        np.testing.assert_allclose(chosen, wanted[np.arange(len(wanted)), tokens[1:]], atol=2e-4)
        for each, row in zip(found[one.request_id], wanted, strict=True):
            assert [value for _, value in each.top] == pytest.approx(np.sort(row)[::-1][: index % 4], abs=2e-4)
            assert [row[token] for token, _ in each.top] == pytest.approx([value for _, value in each.top], abs=2e-4)
