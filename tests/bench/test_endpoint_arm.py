"""Running servers as arms: tokens, times, and accepted drafts by what the servers say of them."""

import contextlib
import itertools

import pytest

from pipeline.bench import arms
from pipeline.bench.endpoint_arm import EndpointArm, acceptance_between
from pipeline.dflash.acceptance import Acceptance
from pipeline.engine.request import Request
from pipeline.errors import PipelineError
from pipeline.external.token_endpoint import DraftCounts, TokenEndpoint, counts_in_log, counts_in_metrics
from tests.serve.test_gateway import stand_in
from tests.support.corpus_tokenizer import corpus_tokenizer
from tests.support.fake_engine import FakeEngine
from tests.support.ports import free_port
from tests.support.serving import serving

STOP = 2
REQUESTS = [Request(request_id=f"prompt-{index}", prompt_ids=(10 + index, 50), max_new_tokens=20) for index in range(6)]


def script(request):
    """As many tokens as the prompt says, then the stop token."""
    return [*range(100, 100 + request.prompt_ids[0]), STOP]


@pytest.fixture(scope="module")
def tokenizer():
    return corpus_tokenizer(512)


@contextlib.contextmanager
def arm_of(address, num_at_once, block_size, **options):
    with contextlib.closing(TokenEndpoint(address, **options)) as endpoint:
        yield EndpointArm(endpoint, num_at_once, (STOP,), block_size)


def served(tokenizer, block_size):
    return serving(FakeEngine(script, [STOP], block_size=block_size, round_tokens=3), tokenizer)


@pytest.mark.parametrize("num_at_once", [1, 3])
def test_our_own_servers_are_compared_by_tokens_and_by_what_they_accepted(tokenizer, num_at_once):
    with (
        served(tokenizer, None) as plain_address,
        served(tokenizer, 8) as dflash_address,
        arm_of(plain_address, num_at_once, None) as plain,
        arm_of(dflash_address, num_at_once, 8) as dflash,
    ):
        passes = []
        found = arms.compare_arms(
            {"plain": plain, "dflash": dflash}, REQUESTS, 2, on_pass=lambda name, one: passes.append(name)
        )
    assert passes == ["plain", "dflash", "dflash", "plain"]
    for each in (*found.plain, *found.dflash):
        assert {name: one.token_ids for name, one in each.answers.items()} == {
            request.request_id: tuple(script(request)[:20]) for request in REQUESTS
        }
        assert each.decode_tokens == sum(len(script(request)[:20]) - 1 for request in REQUESTS)
        assert each.decode_seconds > 0
        assert {name: one.num_tokens for name, one in each.timelines.items()} == {
            name: len(one.token_ids) for name, one in each.answers.items()
        }
    rounds = [min(3, left) - 1 for request in REQUESTS for left in lefts(len(script(request)[:20]) - 1)]
    assert found.acceptance == Acceptance.of(2 * rounds, 8)  # of both passes


def lefts(count):
    """What is left to write before each round of three."""
    return range(count, 0, -3)


def test_an_open_loop_sends_requests_when_they_are_due(tokenizer):
    with served(tokenizer, 8) as address, arm_of(address, 1, 8) as arm:
        found = arm.run(REQUESTS, [0.05 * index for index in range(len(REQUESTS))])
    times = [found.timelines[one.request_id].submitted for one in REQUESTS]
    assert all(later - earlier > 0.04 for earlier, later in itertools.pairwise(times))


def test_an_sglang_jax_server_is_read_by_its_log(tmp_path):
    log = tmp_path / "log"
    log.write_text("Decode batch. accept-len 8.00, x\n")
    with stand_in() as server, arm_of(server.url, 1, 8, log=log) as arm:
        before = counts_in_log(log.read_text())
        answers = arm.run([Request(request_id="a", prompt_ids=(20, 30), max_new_tokens=6)]).answers
        log.write_text(log.read_text() + "Decode batch. #running-req: 1, accept-len 3.00, accept-ratio 0.4\n" * 2)
        seen = acceptance_between(before, counts_in_log(log.read_text()), 8)
    assert answers["a"].token_ids == (21, 31, 100, 101, 102, 103)  # without what it wrote behind the length
    assert seen == Acceptance.of([2, 2], 8)


def test_counters_are_read_by_vllms_names():
    labels = 'engine="0",model_name="m"'
    per_position = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    lines = [f"vllm:spec_decode_num_drafts_total{{{labels}}} 80.0"]
    lines += [f'{per_position}{{{labels},position="{index}"}} {count}.0' for index, count in enumerate([38, 34, 32])]
    text = "\n".join([*lines, ""])
    assert counts_in_metrics(text) == DraftCounts(80, (38, 34, 32))
    assert counts_in_metrics("process_cpu_seconds_total 1\n") is None
    assert acceptance_between(DraftCounts(70, (37, 34, 32)), counts_in_metrics(text), 4).histogram == (9, 1, 0, 0)


def test_a_log_without_rounds_says_nothing():
    assert counts_in_log("Prefill batch.\n") is None
    assert acceptance_between(None, None, 4).num_rounds == 0


def test_a_server_that_is_not_there_is_one_clear_error():
    with pytest.raises(PipelineError, match="is no server of this kind"):
        TokenEndpoint(f"http://127.0.0.1:{free_port()}")


def test_a_server_that_refuses_is_one_clear_error(tokenizer):
    with served(tokenizer, 8) as address, arm_of(address, 1, 8) as arm:
        long = Request(request_id="long", prompt_ids=(5,) * 300, max_new_tokens=6)
        with pytest.raises(PipelineError, match=r"answers 400: .*context_length_exceeded"):
            arm.run([long])
