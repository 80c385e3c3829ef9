"""Our engine against the published dflash package on transformers' target: the same directories, prompts and limits."""

import pytest

from pipeline.dflash.acceptance import Acceptance
from pipeline.engine.config import EngineConfig
from pipeline.engine.engine import Engine
from pipeline.engine.request import Request
from tests.support import fitted as fitted_draft
from tests.support.fitted import BLOCK_SIZE, MAX_NEW_TOKENS, STOP_TOKEN_IDS

pytestmark = pytest.mark.conformance


@pytest.fixture(scope="module")
def models():
    return fitted_draft.fitted()


@pytest.fixture(scope="module")
def published(models):
    """What `dflash_generate` answers to every prompt."""
    request = fitted_draft.request_of(models.prompts)
    return fitted_draft.ask("dflash_generate", request, target=models.target_path, draft=models.draft_path)


def answers_of(models, draft):
    config = EngineConfig(
        num_slots=5,
        max_length=max(map(len, models.prompts)) + MAX_NEW_TOKENS,
        prefill_chunk=16,
        stop_token_ids=STOP_TOKEN_IDS,
    )
    engine = Engine(models.target, draft, config)
    requests = [
        Request(request_id=str(index), prompt_ids=tuple(prompt), max_new_tokens=MAX_NEW_TOKENS)
        for index, prompt in enumerate(models.prompts)
    ]
    answers = {answer.request_id: answer for answer in engine.generate(requests)}
    return [answers[request.request_id] for request in requests]


@pytest.fixture(scope="module")
def ours(models):
    return answers_of(models, models.draft)


def before_the_limit(lengths):
    """The rounds that start with room for a whole block.

    The package shortens a block that would pass the length limit, and a draft with fewer mask tokens may propose
    others. Our blocks have one size and only their yield is cut. So the rounds may differ there, the tokens not.
    """
    done, rounds = 0, []
    for length in lengths:
        if MAX_NEW_TOKENS - done < BLOCK_SIZE:
            break
        rounds.append(length)
        done += length
    return rounds


def test_plain_decoding_gives_transformers_tokens(models):
    request = fitted_draft.request_of(models.prompts)
    wanted = fitted_draft.ask("gpt_oss_generate", request, model=models.target_path)
    assert min(min(one["gaps"]) for one in wanted) > 1e-4  # no tie: equality is the target's doing, not luck
    assert [list(answer.token_ids) for answer in answers_of(models, None)] == [one["tokens"] for one in wanted]


def test_dflash_decoding_gives_the_published_packages_tokens(models, published, ours):
    assert len(ours) == 32
    assert sum(len(prompt) > models.target.config.sliding_window for prompt in models.prompts) > 20
    assert [list(answer.token_ids) for answer in ours] == [one["tokens"] for one in published]
    assert {answer.finish_reason for answer in ours} == {"stop", "length"}


def test_every_round_accepts_what_the_published_package_accepts(published, ours):
    for mine, theirs in zip(ours, published, strict=True):
        lengths = [count + 1 for count in mine.accepted_per_round]
        assert before_the_limit(lengths) == before_the_limit(theirs["acceptance_lengths"])
        assert sum(lengths) == sum(theirs["acceptance_lengths"]) == len(mine.token_ids) - 1
        if mine.finish_reason == "stop" and len(mine.token_ids) <= MAX_NEW_TOKENS - BLOCK_SIZE:
            assert lengths == theirs["acceptance_lengths"]


def test_accept_length_is_the_published_packages(published, ours):
    rounds = [length for one in published for length in one["acceptance_lengths"]]
    found = Acceptance.of([count for answer in ours for count in answer.accepted_per_round], BLOCK_SIZE)
    assert set(rounds) == set(range(1, BLOCK_SIZE + 1))
    assert found.accept_length == pytest.approx(sum(rounds) / len(rounds), rel=0.02)
