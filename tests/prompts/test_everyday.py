import collections
import random
import re
import subprocess
import sys

import pytest

from pipeline.prompts.everyday import passages
from pipeline.prompts.everyday.requests import REQUEST_WRITERS, request
from pipeline.prompts.sources import everyday
from pipeline.prompts.split import split_by_hash

NUM_REQUESTS = 20_000


@pytest.fixture(scope="module")
def requests():
    return [request(0, index) for index in range(NUM_REQUESTS)]


def test_a_request_is_a_function_of_seed_and_index():
    assert [request(3, index) for index in range(50)] == [request(3, index) for index in range(50)]
    assert [request(3, index) for index in range(50)] != [request(4, index) for index in range(50)]


def test_another_process_with_another_hash_seed_writes_the_same_requests():
    code = "from pipeline.prompts.everyday.requests import request; print([request(3, i) for i in range(50)])"
    environment = {"PYTHONHASHSEED": "77", "PYTHONPATH": ":".join(filter(None, sys.path))}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert answer.stdout.strip() == str([request(3, index) for index in range(50)])


def test_most_of_twenty_thousand_requests_are_distinct(requests):
    assert len(set(requests)) > 15_000


def test_no_request_has_an_empty_or_unfilled_slot(requests):
    for text in requests:
        assert not re.search(r"[{}]|  |\bNone\b| [.,?!]", text), text
        assert text == text.strip()
        assert text[-1] in '.?!"', text


def test_articles_fit_the_word_behind_them(requests):
    wrong = [text for text in requests if re.search(r"\b[Aa] [aeio][a-z]|\b[Aa]n [b-df-gj-np-tv-z]", text)]
    allowed = re.compile(r"\ba (?:one|once|European)\b|\ban (?:hour|honest|heir)\b")
    assert not [text for text in wrong if not allowed.search(text)][:5]


def test_requests_are_short(requests):
    assert max(len(text.split()) for text in requests) < 80
    assert max(map(len, requests)) < 480


@pytest.mark.parametrize(
    "kind", sorted(set(REQUEST_WRITERS), key=lambda kind: kind.__name__), ids=lambda kind: kind.__name__
)
def test_every_kind_of_request_varies(kind):
    texts = [kind(random.Random(f"test/{index}")) for index in range(400)]
    assert len(set(texts)) > 120
    assert len({text.split()[0] for text in texts}) >= 3


@pytest.mark.parametrize("passage", passages.PASSAGES, ids=lambda passage: passage.__name__)
def test_passages_are_a_few_sentences_and_hardly_ever_the_same(passage):
    texts = [passage(random.Random(f"test/{index}")) for index in range(400)]
    assert len(set(texts)) > 350
    assert all(2 <= len(re.findall(r"[.!?](?: |$)", text)) <= 5 for text in texts)


def test_a_set_holds_distinct_prompts_and_begins_with_the_smaller_sets_of_its_seed():
    found = everyday(7, 3_000, "low")
    assert len({prompt.prompt_id for prompt in found.prompts}) == len(found.prompts) == 3_000
    assert found.prompts[:100] == everyday(7, 100, "low").prompts
    assert found.prompts[:100] != everyday(8, 100, "low").prompts
    assert {prompt.effort for prompt in found.prompts} == {"low"}


def test_few_held_out_prompts_are_within_a_word_of_a_training_prompt():
    train, heldout = (
        [prompt.messages[0].content.split() for prompt in side]
        for side in split_by_hash(everyday(0, 4_000, "low").prompts, 0.03125)
    )
    assert 80 < len(heldout) < 180
    by_length = collections.defaultdict(list)
    for words in train:
        by_length[len(words)].append(words)
    near = 0
    for words in heldout:
        differences = (
            sum(one != other for one, other in zip(words, known, strict=True)) for known in by_length[len(words)]
        )
        near += min(differences, default=99) <= 1
    assert near < 0.25 * len(heldout)
