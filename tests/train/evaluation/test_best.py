"""The best of a training's checkpoints, whatever a kill leaves undone."""

import pytest

from pipeline import artifacts
from pipeline.artifacts import PipelineError
from pipeline.dflash import scored
from pipeline.dflash.acceptance import Acceptance
from pipeline.dflash.scored import ScoredText
from pipeline.train import best, runs
from pipeline.train.score import Score


def score(kept):
    """A score of ten rounds, of which `kept` kept one token more than the others."""
    rounds = (1,) * kept + (0,) * (10 - kept)
    text = ScoredText(prompt_id="a prompt", prompt_tokens=2, token_ids=(4, 5, *range(11 + kept)), kept=rounds)
    return Score(1, Acceptance((10 - kept, kept)), texts=(text,))


def save(root, step):
    """A run directory as the trainer leaves it: every other one is gone."""
    run = runs.path_of(root, step)
    run.mkdir()
    (run / "weights").write_text(f"of step {step}")
    artifacts.write_json(run / runs.COMPLETE, {"step": step})
    runs.keep_only(root, run)


def train(root, kept_at):
    for step, kept in kept_at.items():
        save(root, step)
        best.add(root, step, {"heldout": score(kept), "train": score(10)})


@pytest.mark.parametrize(
    ("kept_at", "wanted"),
    [({5: 3, 10: 7, 15: 5}, 10), ({5: 3, 10: 4, 15: 5}, 15), ({5: 3, 10: 3}, 5)],
    ids=["in the middle", "the last", "the earlier of equals"],
)
def test_it_is_the_one_with_the_highest_held_out_accept_length(tmp_path, kept_at, wanted):
    train(tmp_path, kept_at)
    found = best.take(tmp_path)
    assert found.step == wanted
    assert [run.name for run in tmp_path.iterdir() if run.is_dir()] == [f"run-{wanted}"]
    assert (runs.path_of(tmp_path, wanted) / "weights").read_text() == f"of step {wanted}"
    assert [one.step for one in best.read(tmp_path)] == list(kept_at)
    assert best.take(tmp_path) == found  # again, as after a kill
    assert scored.read(tmp_path / scored.FILE) == list(score(kept_at[wanted]).texts)
    assert not list(tmp_path.glob("heldout-*"))


def test_an_evaluation_that_was_written_down_before_a_kill_keeps_its_run_directory(tmp_path, monkeypatch):
    train(tmp_path, {5: 3})
    save(tmp_path, 10)
    with monkeypatch.context() as patched:
        patched.setattr(best, "keep", lambda root: None)
        best.add(tmp_path, 10, {"heldout": score(6), "train": score(10)})
    best.keep(tmp_path)
    save(tmp_path, 15)
    best.add(tmp_path, 15, {"heldout": score(1), "train": score(10)})
    assert best.take(tmp_path).step == 10
    assert scored.read(tmp_path / scored.FILE) == list(score(6).texts)


def test_a_half_copied_run_directory_is_copied_again(tmp_path):
    train(tmp_path, {5: 3})
    kept = runs.path_of(tmp_path / best.BEST, 5)
    (kept / runs.COMPLETE).unlink()
    (kept / "weights").unlink()
    best.keep(tmp_path)
    assert (kept / "weights").read_text() == "of step 5"


def test_a_training_that_is_set_back_forgets_what_came_later(tmp_path):
    train(tmp_path, {5: 3, 10: 7})
    train(tmp_path, {6: 4})
    assert [one.step for one in best.read(tmp_path)] == [5, 6]


def test_without_its_texts_there_is_no_best(tmp_path):
    train(tmp_path, {5: 3})
    (tmp_path / "heldout-5.jsonl").unlink()
    with pytest.raises(PipelineError, match="holds no texts of step 5's evaluation"):
        best.take(tmp_path)


def test_without_its_run_directory_there_is_no_best(tmp_path):
    train(tmp_path, {5: 3})
    for run in (tmp_path, tmp_path / best.BEST):
        runs.keep_only(run, None)
    with pytest.raises(PipelineError, match="holds no run directory of step 5"):
        best.take(tmp_path)
