"""Answers under a grammar against a loop without caches, slots and drafts, whose logits are masked by numpy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipeline.engine.config import EngineConfig
from pipeline.engine.engine import Engine
from pipeline.engine.request import Request
from pipeline.engine.sampling_params import SamplingParams
from pipeline.errors import PipelineError
from pipeline.model.gpt_oss import forward as gpt_oss
from pipeline.model.layers.sampling import sampling_key
from tests.support import fitted as fitted_draft

pytestmark = pytest.mark.usefixtures("compiled_quickly")

STOP, LONGEST, MAX_LENGTH = 5, 24, 96
HOT = 6.0  # so that no text is rare


@pytest.fixture(scope="module")
def models():
    return fitted_draft.fitted()


class Residues:
    """Token ids must lie in a few residue classes, which the last token chooses; ends after `most` tokens."""

    def __init__(self, vocab_size, seed, most, knows=False):
        random = np.random.default_rng(seed)
        self.allowed = random.random((7, vocab_size)) < 0.3
        self.allowed[:, :7] = True  # something always may follow
        self.allowed[:, STOP] = False
        self.most, self.knows, self.text = most, knows, f"residues {seed}"

    def start(self):
        return Follower(self, [])

    def following(self, tokens):
        if len(tokens) >= self.most:
            return np.arange(self.allowed.shape[1]) == STOP
        return self.allowed[tokens[-1] % 7 if tokens else 0]


class Follower:
    def __init__(self, grammar, tokens):
        self.grammar, self.tokens = grammar, tokens

    def advance(self, token_ids):
        for token in token_ids:
            assert self.grammar.following(self.tokens)[token], "the engine wrote what it must not"
            self.tokens.append(int(token))

    def fill(self, drafted, masks):
        found = list(drafted)
        for index in range(len(found) + 1):
            allowed = self.grammar.following([*self.tokens, *found[:index]])
            bits = np.packbits(allowed, bitorder="little")
            masks[index].view(np.uint8)[:] = 0
            masks[index].view(np.uint8)[: len(bits)] = bits
            if index < len(found):
                if self.grammar.knows and allowed.sum() == 1:
                    found[index] = int(allowed.argmax())
                if not allowed[found[index]]:
                    masks[index + 1 :] = 0x5A5A5A5A  # of no meaning
                    break
        return found


def requests_of(models):
    """Greedy ones and drawn ones."""
    vocab_size = models.target.config.vocab_size
    return [
        Request(
            request_id=str(index),
            prompt_ids=tuple(prompt),
            max_new_tokens=LONGEST - index,
            sampling=SamplingParams(
                temperature=0.0 if index % 3 == 0 else 0.9, key=sampling_key(index, "text"), stop_token_ids=(STOP,)
            ),
            grammar=Residues(vocab_size, index, most=4 + 2 * index),
        )
        for index, prompt in enumerate(models.prompts[:9])
    ]


@pytest.fixture(scope="module")
def following(models):
    @jax.jit
    def logits(tokens, length):
        hidden = gpt_oss.forward(models.target, tokens, jnp.zeros(1, jnp.int32), None).hidden
        return gpt_oss.logits(models.target.weights, hidden[0, length - 1])

    def found(text):
        padded = np.zeros((1, MAX_LENGTH), np.int32)
        padded[0, : len(text)] = text
        return np.asarray(logits(padded, len(text)), np.float64)

    return found


def reference(following, request):
    text, answer, params = list(request.prompt_ids), [], request.sampling
    while len(answer) < request.max_new_tokens and (not answer or answer[-1] != STOP):
        values = np.where(request.grammar.following(answer), following(text), -np.inf)
        if params.temperature:
            key = jax.random.wrap_key_data(np.array(params.key, np.uint32), impl="threefry2x32")
            bits = np.asarray(jax.random.bits(jax.random.fold_in(key, len(text)), values.shape), np.float64)
            values = values / params.temperature - np.log(-np.log1p(-(bits + 0.5) / 2**32))
        answer.append(int(values.argmax()))
        text.append(answer[-1])
    return tuple(answer)


def make(models, slots, *, draft=False, **values):
    config = EngineConfig(
        num_slots=slots, max_length=MAX_LENGTH, prefill_chunk=16, page_size=16, samples=True, **values
    )
    return Engine(models.target, models.draft if draft else None, config)


def answers_of(engine, requests):
    return {one.request_id: one.token_ids for one in engine.generate(requests)}


@pytest.fixture(scope="module")
def gold(models, following):
    return {one.request_id: reference(following, one) for one in requests_of(models)}


@pytest.mark.parametrize(
    ("draft", "values"),
    [
        (False, {}),
        (True, {}),
        (True, {"block_sizes": (1, 2, 8)}),
        (True, {"cache_tokens": 96, "reuse_prefixes": True, "row_counts": (1, 2)}),
    ],
    ids=["plain", "DFLASH", "adaptive", "few pages and rows"],
)
def test_an_answer_is_the_targets_own_under_the_same_mask(models, gold, draft, values):
    engine = make(models, 3, draft=draft, **values)
    assert answers_of(engine, requests_of(models)) == gold
    assert {len(answer) for answer in gold.values()} >= {5, 7, 9}  # their grammars ended them


def test_what_must_follow_is_accepted_where_the_grammar_knows_it(models):
    """Grammars that leave one token alone at a time: every round accepts its whole block."""
    vocab_size = models.target.config.vocab_size
    grammar = Residues(vocab_size, 0, most=30, knows=True)
    grammar.allowed = np.eye(7, vocab_size, 40, dtype=bool)
    request = Request(
        request_id="a",
        prompt_ids=(1, 2, 3),
        max_new_tokens=30,
        sampling=SamplingParams(stop_token_ids=(STOP,)),
        grammar=grammar,
    )
    (answer,) = make(models, 2, draft=True).generate([request])
    full = fitted_draft.BLOCK_SIZE - 1
    assert set(answer.accepted_per_round[:-1]) == {full}
    assert list(answer.token_ids[:3]) == [40, 45, 43]


def test_answers_without_a_grammar_beside_such_are_their_own(models, gold):
    free = [
        Request(
            request_id=f"free {index}",
            prompt_ids=tuple(prompt),
            max_new_tokens=20,
            sampling=SamplingParams(temperature=0.9 * (index % 2), key=sampling_key(index, "text")),
        )
        for index, prompt in enumerate(models.prompts[:9])
    ]
    alone = answers_of(make(models, 3, draft=True), free)
    mixed = [one for pair in zip(free, requests_of(models), strict=True) for one in pair]
    engine = make(models, 4, draft=True)
    assert answers_of(engine, mixed) == alone | gold
    assert answers_of(engine, free) == alone  # no mask is left behind


def test_a_constrained_request_that_is_cancelled_leaves_no_mask(models):
    engine = make(models, 1, draft=True)
    request = requests_of(models)[5]
    engine.add(request)
    for _ in range(3):
        engine.step()
    engine.cancel(request.request_id)
    free = Request(request_id="free", prompt_ids=(1, 2, 3), max_new_tokens=20)
    assert answers_of(engine, [free]) == answers_of(make(models, 1, draft=True), [free])


@pytest.mark.parametrize(
    "block_sizes",
    [
        pytest.param((1, 8), id="adaptive"),
        pytest.param((4,), id="fixed below the draft's", marks=pytest.mark.slow),
    ],
)
def test_nothing_compiles_for_a_grammar_after_warming_up(models, gold, block_sizes):
    engine = make(models, 5, draft=True, block_sizes=block_sizes, row_counts=(1,))
    largest = block_sizes[-1]
    engine.warm_up()
    programs = [
        engine._steps.prefill,
        engine._steps.plain_step,
        engine._steps.dflash_round(largest),
        engine._steps.dflash_round(8),
        engine._steps.draft_apart(largest),
        engine._steps.draft_apart(8),
        engine._steps.verify_apart,
        engine._steps.set_masks,
        engine._steps.extend_context,
    ]
    before = [one._cache_size() for one in programs]
    assert answers_of(engine, requests_of(models)) == gold
    assert [one._cache_size() for one in programs] == before


class Three:
    """Texts of three tokens, of which each is one of a few that depend on those before it."""

    def __init__(self, vocab_size):
        self.vocab_size, self.text = vocab_size, "three"

    def start(self):
        return Follower(self, [])

    knows = False

    def following(self, tokens):
        allowed = np.zeros(self.vocab_size, bool)
        if len(tokens) < 3:
            allowed[[10, 11, 12 + sum(tokens) % 3]] = True
        else:
            allowed[STOP] = True
        return allowed


@pytest.mark.parametrize(
    "draft", [pytest.param(False, id="plain", marks=pytest.mark.slow), pytest.param(True, id="DFLASH")]
)
def test_the_distribution_is_the_targets_own_under_the_same_mask(models, following, draft):
    """Chi-square of 4,000 texts against the probability of each text that the grammar has."""
    prompt, grammar, count = (3, 1, 4), Three(models.target.config.vocab_size), 4000
    wanted = {}
    for text in itertools.product(range(10, 16), repeat=3):
        probability = 1.0
        for index, token in enumerate(text):
            allowed = grammar.following(text[:index])
            if not allowed[token]:
                probability = 0.0
                break
            weights = np.where(allowed, np.exp(following([*prompt, *text[:index]]) / HOT), 0)
            probability *= weights[token] / weights.sum()
        if probability:
            wanted[text] = probability
    assert sum(wanted.values()) == pytest.approx(1)
    engine = make(models, 32, draft=draft)
    requests = (
        Request(
            request_id=str(index),
            prompt_ids=prompt,
            max_new_tokens=4,
            sampling=SamplingParams(temperature=HOT, key=sampling_key(index, "seed"), stop_token_ids=(STOP,)),
            grammar=grammar,
        )
        for index in range(count)
    )
    found = dict.fromkeys(wanted, 0)
    for answer in engine.generate(requests):
        found[answer.token_ids[:3]] += 1
        assert answer.token_ids[3:] == (STOP,)
    expected = np.array(list(wanted.values())) * count
    statistic = ((np.array(list(found.values())) - expected) ** 2 / expected).sum()
    bound = len(wanted) - 1 + 4 * np.sqrt(2 * (len(wanted) - 1))
    assert statistic < bound
    assert expected.min() > 5


def test_a_grammar_wants_programs_that_know_masks(models):
    config = EngineConfig(num_slots=1, max_length=MAX_LENGTH, prefill_chunk=16)
    request = Request(request_id="a", prompt_ids=(1,), max_new_tokens=4, grammar=Three(512))
    with pytest.raises(PipelineError, match="made without `samples`"):
        Engine(models.target, None, config).add(request)


def test_a_grammar_says_where_an_answer_ends(models):
    sampling = SamplingParams(min_tokens=2)
    request = Request(request_id="a", prompt_ids=(1,), max_new_tokens=4, grammar=Three(512), sampling=sampling)
    with pytest.raises(PipelineError, match="leave min_tokens out"):
        make(models, 1).add(request)
