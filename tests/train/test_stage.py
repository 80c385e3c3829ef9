"""The stage as a whole, through EasyDeL, each run in a process of its own as in the pipeline."""

import json
import shutil
import signal

import pytest

from pipeline.artifacts import artifact
from pipeline.artifacts.files import write_json
from pipeline.config.fields import CHECKPOINT, TARGET, TEACHER_CACHE
from pipeline.errors import PipelineError
from pipeline.train import stage
from pipeline.train.easydel import run_directories
from pipeline.train.evaluation.score import Score
from pipeline.workspace.workspace import Workspace
from tests.support import training as tiny_training
from tests.support.recorder import Recorder


def checkpoint_of(config):
    return Workspace(config).open(CHECKPOINT)


def scratch_of(config):
    return artifact.scratch_of(Workspace(config).address(CHECKPOINT))


def test_killed_at_any_step_and_begun_again_it_makes_the_same_bytes(tmp_path):
    undisturbed = tiny_training.trained()
    config = tiny_training.prepare(tmp_path)
    with tiny_training.start(tmp_path, stop_at=5) as process:  # saved, and not evaluated yet
        printed = process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert printed == "stopped\n", process.stderr
    scratch = scratch_of(config)
    assert run_directories.latest(scratch) == 5
    assert not (scratch / "evaluations.json").exists()
    half_written = run_directories.path_of(scratch, 8)  # as a kill within the next save would leave it
    shutil.copytree(run_directories.path_of(scratch, 5), half_written)
    (half_written / run_directories.COMPLETE).unlink()
    shutil.rmtree(half_written / "model" / "fuse")
    (scratch / "evaluation.json.tmp").write_text("{")

    with tiny_training.start(tmp_path) as process:
        output, errors = process.communicate(timeout=tiny_training.LIMIT_SECONDS)
    assert process.returncode == 0, errors
    steps = [step for name, step, _ in json.loads(output) if name == "train/loss"]
    assert "train: going on; 5 of 12 steps are made" in errors
    assert steps == list(range(6, 13))  # it went on behind the last complete run directory
    made, wanted = checkpoint_of(config), checkpoint_of(undisturbed)
    assert made.files == wanted.files
    assert made.fingerprint == wanted.fingerprint
    assert not scratch.exists()


def test_the_artifact_holds_the_best_run_directory_and_what_is_said_of_it():
    config = tiny_training.trained()
    made = checkpoint_of(config)
    names = {name.split("/")[0] for name in made.files}
    evaluations = json.loads((made.path / "evaluations.json").read_text())
    assert [one["step"] for one in evaluations] == [5, 10, 12]
    best = max(evaluations, key=lambda one: one["heldout"]["accept_length"])
    step = f"run-{best['step']}"
    others = {"data.json", "draft_config.json", "evaluation.json", "evaluations.json", "heldout.jsonl", "contract.json"}
    assert names == {step} | others
    run_files = {name.split("/")[1] for name in made.files if name.startswith(f"{step}/")}
    assert {"model", "tx", "config.json", "metadata.json", "tensorstore_index.json"} <= run_files
    evaluation = json.loads((made.path / "evaluation.json").read_text())
    assert evaluation == best
    for split in ("heldout", "train"):
        found = Score.from_json(evaluation[split])
        assert evaluation[split] == json.loads(json.dumps(found.to_json()))
        assert found.num_sequences == 7
        assert found.total.num_rounds == found.by_effort["low"].num_rounds > 0


def test_metrics_are_logged_with_their_steps():
    config = tiny_training.trained()
    tracked = json.loads((tiny_training.root_of(config) / "tracked.json").read_text())
    steps = {name: [step for other, step, _ in tracked if other == name] for name, _, _ in tracked}
    values = {(name, step): value for name, step, value in tracked}
    every = list(range(1, 13))
    for name in ("loss", "token_accuracy", "anchor_accept_length", "learning_rate"):
        assert steps[f"train/{name}"] == every
    assert steps["train/tokens_per_second"] == every[1:]  # the first step compiles
    assert steps["eval/accept_length"] == [5, 10, 12]
    assert steps["eval_train/accept_length"] == steps["eval/train_to_heldout_ratio"] == [5, 10, 12]
    assert steps["train/flops_per_second"] == every[1:]
    assert "train/mfu" not in steps  # no chip is known behind a CPU
    assert {"eval/accept_rate", "eval/accept_rate_at_1", "eval/accept_rate_at_3"} <= steps.keys()
    rates = [values["train/learning_rate", step] for step in every]
    assert max(rates) == pytest.approx(1e-2)
    assert rates[-1] < 1e-3 < rates[5]
    assert values["train/loss", 12] < values["train/loss", 1]


def test_a_trained_draft_is_not_trained_again():
    config, tracker = tiny_training.trained(), Recorder()
    before = checkpoint_of(config)
    stage.run(config, tracker)  # in this process: EasyDeL is not even imported
    evaluation = json.loads((before.path / "evaluation.json").read_text())
    assert tracker.by_step["eval/accept_length", evaluation["step"]] == evaluation["heldout"]["accept_length"]
    assert checkpoint_of(config) == before


def test_an_unfinished_training_with_other_settings_is_refused(tmp_path):
    config = tiny_training.prepare(tmp_path)
    config.train.path = str(tmp_path / "mine")
    other = tiny_training.configuration(tmp_path, steps=13)
    workspace = Workspace(other)
    cache = workspace.open(TEACHER_CACHE)
    parents = {TARGET: workspace.target.fingerprint, TEACHER_CACHE: cache.fingerprint}
    contract = workspace.contract(CHECKPOINT, workspace.provenance(CHECKPOINT, parents))
    begun = artifact.open_scratch(tmp_path / "mine", resume=True) / artifact.CONTRACT
    write_json(begun, contract.to_json())
    with pytest.raises(PipelineError, match=r"mine\.partial holds the unfinished training of a draft with other"):
        stage.run(config, Recorder())


def test_without_a_teacher_cache_it_says_which_stage_makes_one(tmp_path):
    tiny_training.make_target(tmp_path / "target")
    with pytest.raises(PipelineError, match="stage=teacher_cache"):
        stage.run(tiny_training.configuration(tmp_path), Recorder())


def test_run_directories_that_were_not_completed_do_not_count(tmp_path):
    assert run_directories.latest(tmp_path) == 0
    for step in (5, 10, 15):
        run_directories.path_of(tmp_path, step).mkdir()
    for step in (5, 10):
        write_json(run_directories.path_of(tmp_path, step) / run_directories.COMPLETE, {"step": step})
    assert run_directories.latest(tmp_path) == 10
    run_directories.keep_only(tmp_path, run_directories.path_of(tmp_path, 10))
    assert [entry.name for entry in tmp_path.iterdir()] == ["run-10"]
