"""Sampled answers against a loop without caches and slots: a request's tokens are its own, whatever runs beside it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipeline.engine.config import EngineConfig
from pipeline.engine.engine import Engine, EngineTimes
from pipeline.engine.request import Request
from pipeline.errors import PipelineError
from pipeline.model.dflash import weights as dflash_weights
from pipeline.model.dflash.config import DFlashConfig
from pipeline.model.dflash.model import DraftModel
from pipeline.model.gpt_oss import forward as gpt_oss
from pipeline.model.gpt_oss.config import GptOssConfig
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.gpt_oss.weights import random_weights
from pipeline.model.layers.rope import Rope
from pipeline.model.layers.sampling import Sampling, sampling_key
from tests.support import models as tiny_models

pytestmark = pytest.mark.usefixtures("compiled_quickly")

CONFIG = GptOssConfig.from_hf(tiny_models.LEGACY_TARGET)
MAX_LENGTH, PREFILL_CHUNK, LONGEST = 60, 8, 20
STOPS = (5, 71)
SAMPLING = Sampling(temperature=0.8, top_p=0.9)
SEED = 3


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
            sampling_key=sampling_key(SEED, f"prompt {index}"),
        )
        for index in range(9)
    ]


def chosen(logits, key, position, sampling):
    """numpy's argmax over the nucleus, found by sorting, of logits and noise from JAX's random bits."""
    scaled = logits.astype(np.float64) / sampling.temperature
    order = np.argsort(-scaled)
    weights = np.exp(scaled - scaled.max())
    weights /= weights.sum()
    nucleus = order[np.cumsum(weights[order]) - weights[order] < sampling.top_p]
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
            text.append(chosen(np.asarray(following(padded, len(text))), request.sampling_key, len(text), SAMPLING))
        answers[request.request_id] = tuple(text[len(request.prompt_ids) :])
    return answers


def make(target, slots, sampling=SAMPLING, draft=None, prefill_chunk=PREFILL_CHUNK):
    config = EngineConfig(
        num_slots=slots,
        max_length=MAX_LENGTH,
        prefill_chunk=prefill_chunk,
        stop_token_ids=STOPS,
        sampling=sampling,
    )
    return Engine(target, draft, config)


def answers_of(engine, requests):
    return {one.request_id: one.token_ids for one in engine.generate(requests)}


def test_the_answers_are_of_both_endings_and_not_greedys(target, requests, gold):
    greedy = answers_of(
        make(target, 3, sampling=None),
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
    again = [Request(**{**vars(one), "sampling_key": sampling_key(4, one.request_id)}) for one in requests]
    found = answers_of(make(target, 3), again)
    assert sum(found[name] != answer for name, answer in gold.items()) > len(gold) / 2


def test_equal_prompts_with_equal_keys_give_one_answer_and_with_others_others(target):
    keys = {"a": sampling_key(0, "x"), "b": sampling_key(0, "y"), "c": sampling_key(0, "x")}
    requests = [
        Request(request_id=name, prompt_ids=(3, 9, 27), max_new_tokens=12, sampling_key=key)
        for name, key in keys.items()
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


def test_a_key_goes_with_sampling_and_with_nothing_else(target, requests):
    bare = Request(request_id="bare", prompt_ids=(1,), max_new_tokens=1)
    with pytest.raises(PipelineError, match="request 'bare' has no key; the engine samples"):
        make(target, 1).add(bare)
    with pytest.raises(PipelineError, match="request '0' has a key; the engine decodes greedily"):
        make(target, 1, sampling=None).add(requests[0])


@pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(-1.0), Sampling(1.0, 0.0), Sampling(1.0, 1.1)])
def test_a_distribution_that_is_none_is_refused(target, sampling):
    with pytest.raises(PipelineError, match="temperature must be positive, top_p above 0 and at most 1"):
        make(target, 1, sampling=sampling)


def test_sampling_with_a_draft_is_refused(target):
    config = DFlashConfig(
        vocab_size=CONFIG.vocab_size,
        hidden_size=CONFIG.hidden_size,
        intermediate_size=56,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        rope=Rope(theta=1e6),
        tapped_layers=(0,),
        num_target_layers=2,
        block_size=4,
        mask_token_id=7,
    )
    draft = DraftModel(config, dflash_weights.random_weights(config, jax.random.key(0)))
    with pytest.raises(PipelineError, match=r"a draft and a temperature of 0\.8; with a draft decoding is greedy"):
        make(target, 1, draft=draft)
