"""The stage as a whole: resumed runs make the same bytes, and what cannot be done is refused before it is begun."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.artifacts import artifact
from pipeline.artifacts.artifact import Artifact
from pipeline.config.choices import Effort, OnBadRow, Precision, PromptSource
from pipeline.config.fields import TEACHER_CACHE
from pipeline.config.schema import PipelineConfig
from pipeline.engine.capture import Disagreement
from pipeline.errors import PipelineError
from pipeline.prompts import spelled
from pipeline.store.layout import HEADER, SHARD, SPLITS
from pipeline.store.reader import open_split
from pipeline.teacher_cache import shards, stage
from pipeline.tracking.run import Run
from pipeline.workspace.workspace import Workspace
from tests.support.compiled import QUICKLY
from tests.support.damage import flip
from tests.support.paths import ROOT

NUM_SHARDS = 5
STAGE_PROCESS = """
import pickle, sys
from pipeline.teacher_cache import stage
from pipeline.tracking.run import SilentRun
stage.run(pickle.load(open(sys.argv[1], "rb")), SilentRun())
"""
START_SECONDS = 120


def _made_by(config: PipelineConfig) -> Artifact:
    path = Workspace(config).address(TEACHER_CACHE)
    return artifact.read(path, TEACHER_CACHE, make_with="the test", verify=True)


def _scratch(config: PipelineConfig) -> Path:
    return artifact.scratch_of(Workspace(config).address(TEACHER_CACHE))


def test_every_prompt_is_accounted_for(cache: Artifact) -> None:
    summary = json.loads((cache.path / stage.SUMMARY).read_text())
    lines = [json.loads(line) for line in (cache.path / stage.PROMPTS).read_text().splitlines()]
    assert len(lines) == 26 == summary["num_sequences"] + summary["num_skipped"]
    assert len({line["prompt_id"] for line in lines}) == 26
    for split in SPLITS:
        reader = open_split(cache.path, split)
        used = [line for line in lines if line["split"] == split and line["skipped"] is None]
        assert reader.prompt_ids == [line["prompt_id"] for line in used]
        assert reader.prompt_tokens.tolist() == [line["num_tokens"] for line in used]
        assert summary["splits"][split]["num_tokens"] == reader.num_tokens.sum()
        assert np.all(reader.num_tokens > reader.prompt_tokens)
    assert len(list(cache.path.glob("*/*/shard.json"))) == NUM_SHARDS


def test_the_contract_names_efforts_and_tapped_layers(cache: Artifact) -> None:
    assert cache.contract["text"]["reasoning_efforts"] == ["low"]
    assert cache.contract["features"]["tapped_layers"] == [0, 2]
    assert cache.contract["draft"] is None


def test_a_complete_cache_is_left_alone(cache: Artifact, config: PipelineConfig, tracker: Run) -> None:
    config.teacher_cache.path = str(cache.path)
    before = (cache.path / artifact.MANIFEST).stat().st_mtime_ns
    stage.run(config, tracker)
    assert (cache.path / artifact.MANIFEST).stat().st_mtime_ns == before
    assert tracker.metrics["teacher_cache/num_sequences"] == 26


def test_a_path_that_holds_other_settings_is_refused(cache: Artifact, config: PipelineConfig, tracker: Run) -> None:
    config.teacher_cache.path = str(cache.path)
    config.seed = 1
    with pytest.raises(PipelineError, match=r"made with other settings.*\n  seed: found 0, wanted 1"):
        stage.run(config, tracker)


def test_kill_9_and_the_same_command_give_the_undisturbed_bytes(
    cache: Artifact, config: PipelineConfig, tracker: Run, tmp_path: Path
) -> None:
    pickled = tmp_path / "config.pickle"
    pickled.write_bytes(pickle.dumps(config))
    process = subprocess.Popen(
        [sys.executable, "-c", STAGE_PROCESS, str(pickled)],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | QUICKLY,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(_scratch(config) / "train" / "00000" / SHARD, process)
    finally:
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    left = len(list(_scratch(config).glob("*/*/shard.json")))
    assert 1 <= left <= NUM_SHARDS
    stage.run(config, tracker)
    assert _made_by(config).fingerprint == cache.fingerprint
    assert tracker.metrics["teacher_cache/gold_accept_length"] == 4.0
    assert tracker.metrics["teacher_cache/random_accept_length"] < 1.1


def _wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not path.exists():
        assert process.poll() is None, f"the stage ended with {process.returncode}"
        assert time.monotonic() < deadline, f"no {path} within {START_SECONDS} s"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("rows.json", 2),
        ("shard.json", 1),
        ("00001", 1),
        ("store.json", 1),
        ("summary.json", 1),
        ("contract.json", 1),
        ("manifest.json", 1),
        ("random-", 1),
    ],
    ids=lambda value: str(value),
)
def test_a_run_ended_before_any_rename_resumes_to_the_same_bytes(
    cache: Artifact, config: PipelineConfig, tracker: Run, monkeypatch: pytest.MonkeyPatch, name: str, count: int
) -> None:
    """All shards but two are there already, so that a case costs little."""
    shutil.copytree(cache.path, _scratch(config))
    for file in (stage.SUMMARY, stage.PROMPTS, HEADER, artifact.CONTRACT, artifact.MANIFEST):
        (_scratch(config) / file).unlink()
    for last in ("train/00001", "heldout/00000"):
        shutil.rmtree(_scratch(config) / last)
    monkeypatch.setattr(os, "rename", _ending_before(name, count, os.rename))
    with pytest.raises(KeyboardInterrupt):
        stage.run(config, tracker)
    monkeypatch.undo()
    assert not Workspace(config).address(TEACHER_CACHE).exists()
    stage.run(config, tracker)
    assert _made_by(config).fingerprint == cache.fingerprint


def _ending_before(name: str, count: int, rename: Callable[..., None]) -> Callable[..., None]:
    left = [count]

    def ending(source: Path, final: Path) -> None:
        if Path(final).name.startswith(name):
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
        rename(source, final)

    return ending


@pytest.mark.parametrize("damage", ["flipped byte", "stray files", "other settings"])
def test_what_cannot_be_kept_is_made_again(
    cache: Artifact, config: PipelineConfig, tracker: Run, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    scratch = _scratch(config)
    shutil.copytree(cache.path, scratch)
    shard = scratch / "train" / "00001"
    if damage == "flipped byte":
        flip(shard / "features" / "c" / "0" / "0", -1)
    elif damage == "stray files":
        (shard / "stray").write_text("x")
        (scratch / "train" / "00099.partial" / "tokens").mkdir(parents=True)
        (scratch / "train" / "00099.partial" / "tokens" / "c").write_text("x")
        (scratch / "summary.json.tmp").write_text("x")
    else:
        header = json.loads((shard / SHARD).read_text())
        (shard / SHARD).write_text(json.dumps(header | {"fingerprint": "other"}))
    made_paths = []
    make = shards.make_shard
    monkeypatch.setattr(shards, "make_shard", lambda plan, *rest: made_paths.append(plan.path) or make(plan, *rest))
    stage.run(config, tracker)
    assert made_paths == [shard]
    assert _made_by(config).fingerprint == cache.fingerprint


def test_prompts_that_are_too_long_are_skipped_and_listed(config: PipelineConfig, tracker: Run) -> None:
    config.teacher_cache.max_prompt_tokens = 60
    config.teacher_cache.max_new_tokens = 10
    stage.run(config, tracker)
    cache = _made_by(config)
    lines = [json.loads(line) for line in (cache.path / stage.PROMPTS).read_text().splitlines()]
    skipped = [line for line in lines if line["skipped"]]
    assert 0 < len(skipped) < 26 == len(lines)
    assert tracker.metrics["teacher_cache/skipped"] == len(skipped)
    assert all(line["num_tokens"] > 60 and "at most 60" in line["skipped"] for line in skipped)
    assert tracker.metrics["teacher_cache/num_sequences"] == 26 - len(skipped)


def test_a_cache_without_prompts_that_are_rendered_now_is_verified_by_what_it_has(
    config: PipelineConfig, tracker: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older versions of this program skipped prompts that spell control tokens."""
    file = tmp_path / "prompts.jsonl"
    texts = [f"Say {'<|end|>' if number in (2, 5) else 'end'} {number} times." for number in range(12)]
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    config.prompts.source, config.prompts.path = PromptSource.jsonl, str(file)
    config.teacher_cache.max_new_tokens, config.teacher_cache.verify = 12, 1.0
    monkeypatch.setattr(spelled, "encode", lambda *_: None)
    stage.run(config, tracker)
    assert tracker.metrics["teacher_cache/skipped"] == 2
    num_train = open_split(_made_by(config).path, "train").num_sequences
    monkeypatch.undo()
    tracker.metrics.clear()
    stage.run(config, tracker)
    assert tracker.metrics["teacher_cache/verified_sequences"] == num_train
    monkeypatch.setattr(stage, "unused_of", lambda _: {})  # a cache that does not say why it lacks them
    with pytest.raises(PipelineError, match=r"0 of its \d+ train sequences .* [12] rendered prompts have no sequence"):
        stage.run(config, tracker)


def test_no_usable_prompt_is_one_error(config: PipelineConfig, tracker: Run) -> None:
    config.teacher_cache.max_prompt_tokens = 3
    with pytest.raises(PipelineError, match=r"none of the \d+ train prompts can be used; raise .*max_prompt_tokens"):
        stage.run(config, tracker)
    assert not _scratch(config).exists()


def test_a_bad_jsonl_row_is_named_with_its_line(config: PipelineConfig, tracker: Run, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "What is 2 + 2?"}\n{"prompt": 7}\n')
    config.prompts.source, config.prompts.path = PromptSource.jsonl, str(file)
    config.prompts.on_bad_row = OnBadRow.error
    with pytest.raises(PipelineError, match="line 2"):
        stage.run(config, tracker)


def test_rows_bring_efforts_and_tools_others_get_an_effort_of_the_mix_and_the_contract_names_them(
    config: PipelineConfig, tracker: Run, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"Count to {n}."} | ({"effort": "high"} if n % 2 else {}) for n in range(12)]
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    turns = [{"role": "user", "content": "Go."}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    tool = {"type": "function", "function": {"name": "f", "description": "Goes."}}
    rows[0] = {"messages": [*turns, {"role": "tool", "content": "gone"}], "tools": [tool]}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.prompts.source, config.prompts.path = PromptSource.jsonl, str(file)
    config.prompts.effort, config.prompts.effort_mix = Effort.mixed, {"low": 1.0}
    config.teacher_cache.max_prompt_tokens = 192
    stage.run(config, tracker)
    lines = [json.loads(line) for line in (_made_by(config).path / "prompts.jsonl").read_text().splitlines()]
    (line,) = [line for line in lines if "tools" in line]
    assert (line["messages"], line["tools"], line["skipped"]) == (rows[0]["messages"], [tool], None)
    cache = _made_by(config)
    assert cache.contract["text"]["reasoning_efforts"] == ["high", "low"]
    assert set(open_split(cache.path, "train").efforts) == {"high", "low"}


def test_a_disk_too_small_is_refused_before_any_work(
    config: PipelineConfig, tracker: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10**6, used=10**6, free=10**4))
    with pytest.raises(PipelineError, match=r"the teacher cache needs 1 MiB at .*, 0 MiB are free"):
        stage.run(config, tracker)
    assert not _scratch(config).exists()


def test_a_disk_that_fills_up_is_one_error(
    config: PipelineConfig, tracker: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise ValueError('Error writing "x": No space left on device')  # as tensorstore says it

    monkeypatch.setattr(shards, "write_shard", full)
    with pytest.raises(PipelineError, match=r"No space left on device while writing .* run the same command"):
        stage.run(config, tracker)


def test_more_positions_than_the_target_has_is_refused(config: PipelineConfig, tracker: Run) -> None:
    config.teacher_cache.max_new_tokens = 200
    with pytest.raises(PipelineError, match=r"max_prompt_tokens \+ .*max_new_tokens is 360; the target has 256"):
        stage.run(config, tracker)


def test_answers_that_cannot_hold_a_block_are_refused_before_the_first_token(
    config: PipelineConfig, tracker: Run
) -> None:
    config.teacher_cache.max_new_tokens = config.draft.block_size
    with pytest.raises(PipelineError, match=r"max_new_tokens is 4; it must be above the draft's block size \(4\)"):
        stage.run(config, tracker)
    assert not _scratch(config).exists()


@pytest.mark.parametrize(("gap", "fails"), [(1e-5, False), (0.01, True)], ids=["near-tie", "contradiction"])
def test_a_float32_target_may_not_contradict_its_own_text(
    config: PipelineConfig, tracker: Run, monkeypatch: pytest.MonkeyPatch, gap: float, fails: bool
) -> None:
    found = iter([[Disagreement(7, 1, 2, gap)]])
    monkeypatch.setattr(shards, "disagreements", lambda *_: next(found, []))
    if fails:
        with pytest.raises(PipelineError, match=r"position 7, generated 1, read 2, logit gap 0\.01"):
            stage.run(config, tracker)
        return
    stage.run(config, tracker)
    assert tracker.documents[stage.SUMMARY]["splits"]["train"]["num_disagreements"] == 1


def test_a_bfloat16_target_is_cached_and_checked(config: PipelineConfig, tracker: Run) -> None:
    config.target.precision = Precision.bfloat16
    config.prompts.count, config.teacher_cache.max_new_tokens = 12, 16
    stage.run(config, tracker)
    assert tracker.metrics["teacher_cache/gold_accept_length"] >= 0.95 * config.draft.block_size
    assert _made_by(config).contract["target"]["weight_precision"] == "bfloat16"
