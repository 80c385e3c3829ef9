"""Numbers that mean less than they seem to: loops, leaked prompts, random tokens, slow baselines, cut answers."""

import numpy as np
import pytest

from pipeline.bench import guards, leaks, loops, random_text
from pipeline.bench.loops import is_looping
from pipeline.engine.request import Completion
from pipeline.errors import PipelineError
from pipeline.prompts import corpus
from pipeline.prompts.sources import Prompt
from pipeline.store.layout import CachedSequence
from pipeline.store.reader import CacheSplit
from tests.support.corpus_tokenizer import corpus_tokenizer

GOOD = {
    "accept_length": 3.0,
    "cut_answers": 0,
    "num_rounds": 9,
    "engine_over_training": 1.0,
    "plain_share_of_machine": 0.6,
}


def answer(name, token_ids, reason="stop"):
    return Completion(request_id=name, token_ids=tuple(token_ids), finish_reason=reason, accepted_per_round=())


@pytest.mark.parametrize("period", [1, 2, 7, 32])
def test_an_answer_that_says_the_same_again_and_again_is_a_loop(period):
    cycle = list(range(100, 100 + period))
    times = max(loops.LEAST_TIMES, -(-loops.LEAST_TOKENS // period))
    assert is_looping([1, 2, 3, *cycle * times, 9])
    assert not is_looping([1, 2, 3, *cycle * (times - 1)])


def test_a_word_said_five_times_and_a_text_are_no_loops():
    random = np.random.default_rng(0)
    assert not is_looping([5] * 20)
    assert not is_looping(random.integers(0, 50, 400).tolist())
    assert not is_looping([])


def test_too_many_loops_are_left_out_and_said():
    answers = {f"prompt-{index}": answer(f"prompt-{index}", range(60)) for index in range(8)}
    answers |= {f"prompt-{index}": answer(f"prompt-{index}", [7, 8] * 40) for index in (8, 9, 10)}
    few, many = guards.select(answers, 0.5), guards.select(answers, 0.1)
    assert (few.num_looping, few.num_left_out, len(few.request_ids)) == (3, 0, 11)
    assert (many.num_looping, many.num_left_out) == (3, 3)
    assert many.request_ids == tuple(f"prompt-{index}" for index in range(8))
    (said,) = guards.warnings_of(GOOD, many, 0.1)
    assert "3 of 11 answers repeat themselves" in said
    assert "3 are left out" in said
    assert guards.warnings_of(GOOD, few, 0.5) == []


def test_where_every_answer_loops_the_numbers_are_said_to_be_of_loops():
    every = guards.select({"prompt-0": answer("prompt-0", [7] * 90)}, 0.1)
    assert every.request_ids == ("prompt-0",)
    assert "the numbers are of loops" in guards.warnings_of(GOOD, every, 0.1)[0]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"plain_share_of_machine": 0.02}, "a speedup over a slow baseline is no speedup"),
        ({"accept_length": 1.02}, "other tapped layers"),
        ({"engine_over_training": 0.7}, "70% of what training measured"),
        ({"cut_answers": 4}, "4 of 10 answers were cut"),
        ({"num_rounds": 0}, "does not say what it accepts"),
    ],
)
def test_what_a_reader_must_know_is_said(changed, said):
    selection = guards.Selection(request_ids=(), num_looping=0, num_answers=10)
    (found,) = guards.warnings_of(GOOD | changed, selection, 0.1)
    assert said in found


class Cache(CacheSplit):
    """A split of a teacher cache with these prompts."""

    def __init__(self, prompts):
        self.prompts, self.num_sequences = prompts, len(prompts)
        self.prompt_ids = [f"id {index}" for index in range(len(prompts))]

    def read(self, indices, *, features):
        assert not features
        found = []
        for index in indices:
            ids = np.array([*self.prompts[index], 5, 6, 7], np.int32)
            found.append(
                CachedSequence(
                    token_ids=ids, channels=np.zeros(len(ids), np.uint8), prompt_tokens=len(ids) - 3, features=None
                )
            )
        return found


TEMPLATE = list(range(1000, 1040))


def texts(count, length=60, seed=0):
    random = np.random.default_rng(seed)
    return [[*TEMPLATE, *random.integers(0, 500, length).tolist(), 1] for _ in range(count)]


def prompt(prompt_id):
    return Prompt(prompt_id=prompt_id, messages=(), effort="low")


def test_a_prompt_of_the_training_texts_is_found_by_its_id_and_a_near_one_by_its_tokens():
    trained, fresh = texts(50), texts(3, seed=1)
    near = list(trained[7])
    near[60] = 499  # one token of sixty
    far = [*trained[8][:70], *fresh[0][70:]]
    found = leaks.leaks_of(["new", "id 3", "new", "new"], [near, trained[3], fresh[1], far], Cache(trained))
    assert (found.exact, found.near) == ((1,), (0,))


def test_a_template_in_common_is_no_leak():
    assert leaks.leaks_of(["a", "b"], texts(2, length=12, seed=4), Cache(texts(80, length=12))) == leaks.Leaks((), ())


def test_leaked_prompts_are_refused_by_name():
    trained = texts(30)
    with pytest.raises(PipelineError, match=r"of 2 prompts, 1 are among .* and 1 nearly \(prompt-1, prompt-0\)"):
        leaks.require_unseen([prompt("x"), prompt("id 4")], [trained[2], trained[4]], Cache(trained))


def test_one_near_prompt_of_twenty_is_a_warning(caplog):
    trained, fresh = texts(30), texts(19, seed=3)
    near = list(trained[2])
    near[60] = 499
    asked = [near, *fresh]
    leaks.require_unseen([prompt(f"new {index}") for index in range(20)], asked, Cache(trained))
    assert "1 of 20 prompts are nearly among" in caplog.text
    with pytest.raises(PipelineError, match="1 nearly"):
        leaks.require_unseen([prompt(f"new {index}") for index in range(19)], asked[:19], Cache(trained))


def test_without_the_cache_it_is_said_that_nothing_is_known(caplog):
    leaks.require_unseen([prompt("x")], texts(1), None)
    assert "is not known" in caplog.text


def test_random_tokens_are_refused_and_text_is_not():
    tokenizer = corpus_tokenizer(2048)
    texts = corpus.texts([corpus.conversation(0, index) for index in range(40)])
    random_text.require_text([tokenizer.encode(text) for text in texts], len(tokenizer))
    random = np.random.default_rng(0)
    for vocab_size in (2048, 201_088):
        with pytest.raises(PipelineError, match="random tokens, not text"):
            random_text.require_text(random.integers(0, vocab_size, (8, 512)).tolist(), vocab_size)
    consecutive = [[(start * 977 + index) % 201_088 for index in range(512)] for start in range(8)]
    with pytest.raises(PipelineError, match="random tokens"):
        random_text.require_text(consecutive, 201_088)
    random_text.require_text([[1, 2, 3]], 201_088)  # too short to tell


def test_a_template_does_not_hide_random_tokens():
    random = np.random.default_rng(0)
    prompts = [[7] * 300 + random.integers(0, 200_000, 100).tolist() + [9] * 300 for _ in range(8)]
    assert random_text.num_common(prompts) == 300
    with pytest.raises(PipelineError, match="random tokens"):
        random_text.require_text(prompts, 201_088)
