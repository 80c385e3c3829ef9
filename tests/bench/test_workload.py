"""Requests of a benchmark: the prompts as they are, or real text of exactly the length asked for."""

import pytest

from pipeline.bench.workload import held_out, rendered, requests_of
from pipeline.errors import PipelineError
from pipeline.prompts.messages import Message
from pipeline.prompts.sources import prompt_of
from pipeline.prompts.split import is_heldout
from tests.support.chatml import chatml_tokenizer

PROMPTS = [list(range(start, start + length)) for start, length in ((0, 7), (100, 4), (200, 11), (300, 2), (400, 9))]


def test_held_out_prompts_are_rendered_on_the_day_asked_for():
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%Y-%m-%d') }} {{ messages[0].content }}"
    prompts = [prompt_of([Message("user", f"number {index}")], "low") for index in range(20)]
    texts = [tokenizer.decode(ids) for ids in rendered(held_out(prompts, 0.5), tokenizer, date="2025-08-05")]
    chosen = [prompt for prompt in prompts if is_heldout(prompt.prompt_id, 0.5)]
    assert texts == [f"2025-08-05 {prompt.messages[0].content}" for prompt in chosen]


def test_without_a_length_the_first_prompts_are_taken_as_they_are():
    requests = requests_of(PROMPTS, num_prompts=3, max_new_tokens=17, prompt_tokens=None)
    assert [list(request.prompt_ids) for request in requests] == PROMPTS[:3]
    assert {request.max_new_tokens for request in requests} == {17}
    assert len({request.request_id for request in requests}) == 3


def test_a_set_with_fewer_prompts_is_used_whole():
    assert len(requests_of(PROMPTS, num_prompts=50, max_new_tokens=1, prompt_tokens=None)) == len(PROMPTS)


@pytest.mark.parametrize("length", [1, 5, 11, 12, 30, sum(map(len, PROMPTS))])
def test_with_a_length_every_prompt_has_exactly_that_and_repeats_nothing(length):
    requests = requests_of(PROMPTS, num_prompts=5, max_new_tokens=3, prompt_tokens=length)
    assert {len(request.prompt_ids) for request in requests} == {length}
    for request, prompt in zip(requests, PROMPTS, strict=True):
        assert len(set(request.prompt_ids)) == length
        shared = min(length, len(prompt))
        assert list(request.prompt_ids[-shared:]) == prompt[-shared:]  # its own text stands at the end


def test_a_prompt_is_preceded_by_those_before_it_in_their_order():
    requests = requests_of(PROMPTS, num_prompts=3, max_new_tokens=3, prompt_tokens=17)
    assert list(requests[2].prompt_ids) == [5, 6, *PROMPTS[1], *PROMPTS[2]]
    assert list(requests[0].prompt_ids) == [301, *PROMPTS[4], *PROMPTS[0]]


def test_a_set_too_small_for_the_length_is_refused_with_the_numbers():
    with pytest.raises(PipelineError, match=r"bench.prompt_tokens is 34; all 5 held-out prompts together have 33"):
        requests_of(PROMPTS, num_prompts=2, max_new_tokens=3, prompt_tokens=34)
