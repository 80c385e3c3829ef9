"""Benchmark tools that people have, unchanged, against a server whose answers are known."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.serve.test_api import FINAL, create_engine
from tests.support.corpus_tokenizer import corpus_tokenizer
from tests.support.environments import python_of
from tests.support.oracles import oracle_python
from tests.support.serving import MODEL, serving

pytestmark = [pytest.mark.conformance, pytest.mark.slow]  # in an environment of its own
COMPLETION = "the text é goes on and on"
QUESTIONS = ["What is 17 + 25?", "What is 1 + 2?"]
CHOICES = ["42", "a longer answer"]


@pytest.fixture(scope="module")
def tokenizer():
    return corpus_tokenizer(600)


@pytest.fixture(scope="module")
def address(tokenizer):
    with serving(create_engine(tokenizer, max_length=4096, slots=8), tokenizer) as address:
        yield address


def run(tool, *arguments, **environment):
    """What a tool of the environment prints."""
    return printed([python_of("bench_tools").with_name(tool), *arguments], **environment)


def printed(command, **environment):
    outer = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}  # aiperf wants it unset
    done = subprocess.run(
        [str(part) for part in command],
        env={**outer, "PYTHONPATH": "", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def write_tasks(directory, answer, gold):
    """Two tasks of lm-eval with local data."""
    data = directory / "data.json"
    rows = [{"q": question, "choices": CHOICES, "gold": gold, "a": answer} for question in QUESTIONS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{q}}",
    }
    choose = {
        "task": "choose",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}],
    }
    write = {
        "task": "write",
        "output_type": "generate_until",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 100},
        "metric_list": [{"metric": "exact_match"}],
    }
    for task in (choose, write):
        (directory / f"{task['task']}.yaml").write_text(yaml.safe_dump(shared | task))


def scores(text):
    """The values of lm-eval's table, by task."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: float(row[6]) for row in rows if row[0] in ("choose", "write")}


def test_lm_eval_scores_completions_and_their_log_probabilities(address, tokenizer, tmp_path):
    """The scripted engine's log probabilities make one choice the likelier one of both questions."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    sums = [-sum(tokenizer.encode(f" {choice}", add_special_tokens=False)) for choice in CHOICES]
    write_tasks(tmp_path, COMPLETION, sums.index(max(sums)))
    text = run(
        "lm_eval", "--model", "local-completions", "--tasks", "choose,write", "--include_path", tmp_path,
        "--model_args",
        f"model={MODEL},base_url={address}/v1/completions,tokenizer={tmp_path}/tokenizer,num_concurrent=2",
        HF_HUB_OFFLINE="1",
    )  # fmt: skip
    assert scores(text) == {"choose": 1, "write": 1}


def test_lm_eval_scores_chats(address, tmp_path):
    write_tasks(tmp_path, FINAL, 0)
    text = run(
        "lm_eval", "--model", "local-chat-completions", "--apply_chat_template", "--tasks", "write", "--include_path",
        tmp_path, "--model_args", f"model={MODEL},base_url={address}/v1/chat/completions,num_concurrent=2",
        HF_HUB_OFFLINE="1",
    )  # fmt: skip
    assert scores(text) == {"write": 1}


def test_evalscope_measures_a_chat_and_its_acceptance(address, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "prompts.txt").write_text("\n".join(QUESTIONS))
    text = run(
        "evalscope", "perf", "--url", f"{address}/v1/chat/completions", "--model", MODEL, "--api", "openai",
        "--dataset", "line_by_line", "--dataset-path", tmp_path / "prompts.txt", "--number", "4", "--parallel", "2",
        "--tokenizer-path", tmp_path / "tokenizer", "--outputs-dir", tmp_path / "out",
    )  # fmt: skip
    assert "100%" in text
    assert "Spec. Accept Rate" in text


def test_aiperf_measures_a_stream(address, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    run(
        "aiperf", "profile", "--model", MODEL, "--url", address, "--endpoint-type", "chat", "--streaming",
        "--tokenizer", tmp_path / "tokenizer", "--request-count", "6", "--concurrency", "2",
        "--synthetic-input-tokens-mean", "30", "--output-tokens-mean", "10", "--ui", "none",
        "--output-artifact-dir", tmp_path / "out",
    )  # fmt: skip
    found = json.loads((tmp_path / "out/profile_export_aiperf.json").read_text())
    assert found["request_count"]["avg"] == 6
    assert not found["error_summary"]
    assert found["usage_accepted_prediction_tokens"]["avg"] > 0


def test_dflash_measures_throughput_and_acceptance(address):
    script = Path(__file__).with_name("dflash_benchmark.py")
    text = printed([oracle_python(), script, address, MODEL])
    assert re.search(r"Num prompts: +4", text)
    found = float(re.search(r"Accept length: +([\d.]+)", text).group(1))
    assert 2 < found <= 3  # the scripted engine's rounds of three
    assert re.search(r"Spec verify ct: +\d+", text)


def test_schemathesis_finds_no_server_error(address):
    """Bodies of the API's own description, right and wrong; `make attack` sends more."""
    text = run(
        "schemathesis", "run", f"{address}/openapi.json", "--max-examples", "30", "--checks", "not_a_server_error",
        "--phases", "coverage,fuzzing", "--request-timeout", "20",
    )  # fmt: skip
    found = re.search(r"(\d+) generated, (\d+) passed", text)
    assert found.group(1) == found.group(2)
    assert int(found.group(1)) > 500
