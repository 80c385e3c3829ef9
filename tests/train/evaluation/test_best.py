"""The best of a training's checkpoints, whatever a kill leaves undone."""

import pytest

from pipeline.artifacts.files import write_json
from pipeline.dflash.acceptance import Acceptance
from pipeline.errors import PipelineError
from pipeline.store import heldout_rounds
from pipeline.store.heldout_rounds import HeldoutText
from pipeline.train.easydel import run_directories
from pipeline.train.evaluation import best
from pipeline.train.evaluation.score import Score


def score(accepted):
    """A score of ten rounds, of which `accepted` accepted their one drafted token."""
    rounds = (1,) * accepted + (0,) * (10 - accepted)
    token_ids = (4, 5, *range(11 + accepted))
    text = HeldoutText(prompt_id="a prompt", prompt_tokens=2, token_ids=token_ids, accepted_per_round=rounds)
    return Score(1, Acceptance((10 - accepted, accepted)), texts=(text,))


def save(root, step):
    """A run directory as the trainer leaves it: every other one is gone."""
    run = run_directories.path_of(root, step)
    run.mkdir()
    (run / "weights").write_text(f"of step {step}")
    write_json(run / run_directories.COMPLETE, {"step": step})
    run_directories.keep_only(root, run)


def train(root, accepted_at):
    for step, accepted in accepted_at.items():
        save(root, step)
        best.record(root, step, {"heldout": score(accepted), "train": score(10)})


@pytest.mark.parametrize(
    ("accepted_at", "wanted"),
    [({5: 3, 10: 7, 15: 5}, 10), ({5: 3, 10: 4, 15: 5}, 15), ({5: 3, 10: 3}, 5)],
    ids=["in the middle", "the last", "the earlier of equals"],
)
def test_it_is_the_one_with_the_highest_held_out_accept_length(tmp_path, accepted_at, wanted):
    train(tmp_path, accepted_at)
    found = best.finalize(tmp_path)
    assert found.step == wanted
    assert [run.name for run in tmp_path.iterdir() if run.is_dir()] == [f"run-{wanted}"]
    assert (run_directories.path_of(tmp_path, wanted) / "weights").read_text() == f"of step {wanted}"
    assert [one.step for one in best.read_evaluations(tmp_path)] == list(accepted_at)
    assert best.finalize(tmp_path) == found  # again, as after a kill
    assert heldout_rounds.read_texts(tmp_path / heldout_rounds.FILE) == list(score(accepted_at[wanted]).texts)
    assert not list(tmp_path.glob("heldout-*"))


def test_an_evaluation_that_was_written_down_before_a_kill_keeps_its_run_directory(tmp_path, monkeypatch):
    train(tmp_path, {5: 3})
    save(tmp_path, 10)
    with monkeypatch.context() as patched:
        patched.setattr(best, "link_best", lambda root: None)
        best.record(tmp_path, 10, {"heldout": score(6), "train": score(10)})
    best.link_best(tmp_path)
    save(tmp_path, 15)
    best.record(tmp_path, 15, {"heldout": score(1), "train": score(10)})
    assert best.finalize(tmp_path).step == 10
    assert heldout_rounds.read_texts(tmp_path / heldout_rounds.FILE) == list(score(6).texts)


def test_a_half_copied_run_directory_is_copied_again(tmp_path):
    train(tmp_path, {5: 3})
    copied = run_directories.path_of(tmp_path / best.BEST, 5)
    (copied / run_directories.COMPLETE).unlink()
    (copied / "weights").unlink()
    best.link_best(tmp_path)
    assert (copied / "weights").read_text() == "of step 5"


def test_a_training_that_is_set_back_forgets_what_came_later(tmp_path):
    train(tmp_path, {5: 3, 10: 7})
    train(tmp_path, {6: 4})
    assert [one.step for one in best.read_evaluations(tmp_path)] == [5, 6]


def test_without_its_texts_there_is_no_best(tmp_path):
    train(tmp_path, {5: 3})
    (tmp_path / "heldout-5.jsonl").unlink()
    with pytest.raises(PipelineError, match="holds no texts of step 5's evaluation"):
        best.finalize(tmp_path)


def test_without_its_run_directory_there_is_no_best(tmp_path):
    train(tmp_path, {5: 3})
    for run in (tmp_path, tmp_path / best.BEST):
        run_directories.keep_only(run, None)
    with pytest.raises(PipelineError, match="holds no run directory of step 5"):
        best.finalize(tmp_path)
