"""The stage against two running servers, on the paper's prompt sets: one set of numbers, wherever one looks."""

import json
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pipeline.bench import loading
from pipeline.bench import stage as bench
from pipeline.bench.endpoint_arm import EndpointArm
from pipeline.config.fields import DRAFT
from pipeline.config.schema import BenchConfig
from pipeline.prompts.harmony import render_completion
from pipeline.report import stage as report
from pipeline.workspace.loading import load_target
from pipeline.workspace.workspace import Workspace
from tests.support.corpus_tokenizer import corpus_tokenizer
from tests.support.fake_engine import FakeEngine
from tests.support.recorder import Recorder
from tests.support.served import random_pair
from tests.support.serving import serving

BLOCK_SIZE = 5
ANSWER = "The sum is 11 and no more."


def counters(address):
    """What a server has counted, by the names in its /metrics; it serves one model."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=20) as reply:
        families = text_string_to_metric_families(reply.read().decode())
    return {sample.name: sample.value for family in families for sample in family.samples}


@pytest.fixture
def sets(tmp_path):
    """Local copies: four questions of one turn, two of two."""
    one, two = tmp_path / "gsm8k.jsonl", tmp_path / "question.jsonl"
    one.write_text("".join(json.dumps({"question": f"What is {index} + 2?"}) + "\n" for index in range(4)))
    turns = [["Write a poem.", "Now a song."], ["Name a town.", "And a river."]]
    two.write_text("".join(json.dumps({"question_id": 1, "turns": some}) + "\n" for some in turns))
    return [f"gsm8k:{one}", f"mt-bench:{two}"]


def test_record_page_report_mlflow_and_the_servers_counters_say_the_same(tmp_path, sets, monkeypatch):
    tokenizer = corpus_tokenizer(512)
    config = random_pair(tmp_path, tokenizer)
    asked, before = [], {}

    def script(request):
        asked.append(tokenizer.decode(request.prompt_ids))
        return render_completion(tokenizer, "I count." * (len(request.prompt_ids) % 3), ANSWER)

    def server(block_size):
        engine = FakeEngine(script, [tokenizer.eos_token_id, 511], block_size=block_size, max_length=4000)
        return serving(engine, tokenizer)

    warm_up = EndpointArm.warm_up

    def warmed_up(arm, on_compiled=lambda name: None):
        warm_up(arm, on_compiled)
        before.update(counters(dflash_url))

    with server(None) as plain_url, server(BLOCK_SIZE) as dflash_url:
        config.bench = BenchConfig(
            num_prompts=4, max_new_tokens=60, repeats=2, prompt_sets=sets, plain_url=plain_url, dflash_url=dflash_url
        )
        monkeypatch.setattr(EndpointArm, "warm_up", warmed_up)
        tracker = Recorder()
        measured = bench.run(config, tracker)
        after = counters(dflash_url)

    rounds, accepted = (
        after[f"vllm:spec_decode_{name}_total"] - before[f"vllm:spec_decode_{name}_total"]
        for name in ("num_drafts", "num_accepted_tokens")
    )
    assert rounds > 20
    assert measured["num_rounds"] == rounds
    assert measured["accept_length"] == pytest.approx(1 + accepted / rounds, rel=1e-12)
    assert measured["accept_rate"] == pytest.approx(accepted / rounds / (BLOCK_SIZE - 1), rel=1e-12)

    (record,) = (tmp_path / "bench").glob("*/*/results.json")
    written, page = json.loads(record.read_text()), (record.parent / "report.html").read_text()
    report.run(config, Recorder())
    (compared,) = (tmp_path / "reports").glob("*.html")
    for name in ("accept_length", "accept_rate", "speedup"):
        assert measured[name] == written[name] == tracker.metrics[name] == tracker.documents["results.json"][name]
        assert f"{measured[name]:.3f}" in page
    for name in ("accept_length", "speedup"):
        assert f"{measured[name]:.3f}" in compared.read_text()

    by_set = measured["prompt_sets"]
    assert {name: one["num_prompts"] for name, one in by_set.items()} == {
        "gsm8k": 4,
        "mt-bench": 2,
        "mt-bench turn 2": 2,
    }
    assert all(one["speedup_low"] <= one["speedup"] <= one["speedup_high"] for one in by_set.values())
    assert tracker.metrics["speedup_by_set/gsm8k"] == by_set["gsm8k"]["speedup"]
    assert "mt-bench turn 2" in page
    second = [text for text in asked if "Now a song." in text]
    assert second
    assert all("Write a poem." in text and ANSWER in text and "I count." not in text for text in second)
    assert any("put your final answer within \\boxed{}" in text for text in asked)


def test_the_target_that_answers_earlier_turns_is_loaded_once(tmp_path, sets, monkeypatch):
    loads = []
    monkeypatch.setattr(loading, "load_target", lambda *args: loads.append(args) or load_target(*args))
    config = random_pair(tmp_path, corpus_tokenizer(512))
    config.bench = BenchConfig(num_prompts=4, max_new_tokens=4, repeats=1, prompt_sets=sets)
    workspace = Workspace(config)
    exported = workspace.open(DRAFT)
    models = loading.Models(workspace, exported)
    prompts = loading.prompts(workspace, exported, models)
    assert len(loads) == 1
    requests = loading.requests_for(workspace, loading.rendered(workspace, prompts))
    assert models.networks(requests).target is models.loaded[0]
    assert len(loads) == 1
