"""Finds and preserves the best checkpoint of a training: the one with the highest accept_length on held-out texts.

Every evaluation is recorded beside the run directories, and the best one's run directory is preserved under `best/`,
where EasyDeL does not look for one to resume from. The held-out texts with the rounds over them are written before the
evaluation, and only the best one's stay. `link_best` repairs what a kill between any two of these steps leaves, from
the recorded evaluations alone.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from pipeline import distributed
from pipeline.artifacts.files import write_bytes, write_json
from pipeline.errors import PipelineError
from pipeline.store import heldout_rounds
from pipeline.train.easydel import run_directories
from pipeline.train.evaluation.score import Score

EVALUATIONS, BEST = "evaluations.json", "best"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Holds a draft's scores after a step, on held-out texts and on as many that it was trained on."""

    step: int
    heldout: Score
    train: Score


def read_evaluations(root: Path) -> list[Evaluation]:
    """Returns the evaluations of the training in `root`, in order."""
    file = root / EVALUATIONS
    rows = json.loads(file.read_text()) if file.is_file() else []
    return [Evaluation(row["step"], Score.from_json(row["heldout"]), Score.from_json(row["train"])) for row in rows]


def record(root: Path, step: int, scores: Mapping[str, Score]) -> Evaluation:
    """Records an evaluation, and preserves the run directory of its step if it is the best so far."""
    new = Evaluation(step, scores["heldout"], scores["train"])
    if distributed.is_primary():
        # later ones are of a training that was set back to a checkpoint
        before = [evaluation for evaluation in read_evaluations(root) if evaluation.step < step]
        write_bytes(_texts_of(root, step), heldout_rounds.to_lines(new.heldout.texts))
        write_json(root / EVALUATIONS, [as_json(evaluation) for evaluation in (*before, new)])
        link_best(root)
    return new


def best_of(evaluations: list[Evaluation]) -> Evaluation:
    """Returns the best one; the earlier of two equals."""
    return max(evaluations, key=lambda evaluation: evaluation.heldout.total.accept_length)


def link_best(root: Path) -> None:
    """Makes `best/` hold the best evaluation's run directory and no other."""
    evaluations = read_evaluations(root)
    if not evaluations:
        return
    wanted = run_directories.path_of(root / BEST, best_of(evaluations).step)
    if not (wanted / run_directories.COMPLETE).is_file():
        source = run_directories.path_of(root, best_of(evaluations).step)
        shutil.rmtree(wanted, ignore_errors=True)
        shutil.copytree(source, wanted, copy_function=_link, ignore=shutil.ignore_patterns(run_directories.COMPLETE))
        _link(source / run_directories.COMPLETE, wanted / run_directories.COMPLETE)
    run_directories.keep_only(root / BEST, wanted)
    texts = _texts_of(root, best_of(evaluations).step)
    for other in root.glob(_texts_of(root, "*").name):
        if other != texts:
            other.unlink()


def finalize(root: Path) -> Evaluation:
    """Ends a training: leaves the best run directory as the only one in `root`, and returns its evaluation.

    The held-out texts of that evaluation are left as `heldout_rounds.FILE`. Raises PipelineError when one is missing.
    """
    best = best_of(read_evaluations(root))
    linked, final = run_directories.path_of(root / BEST, best.step), run_directories.path_of(root, best.step)
    if linked.exists():
        shutil.rmtree(final, ignore_errors=True)
        os.rename(linked, final)
    if not (final / run_directories.COMPLETE).is_file():
        raise PipelineError(f"{root} holds no run directory of step {best.step}; delete it and train again")
    run_directories.keep_only(root, final)
    shutil.rmtree(root / BEST, ignore_errors=True)
    texts = _texts_of(root, best.step)
    if texts.exists():
        os.rename(texts, root / heldout_rounds.FILE)
    if not (root / heldout_rounds.FILE).is_file():
        raise PipelineError(f"{root} holds no texts of step {best.step}'s evaluation; delete it and train again")
    return best


def as_json(evaluation: Evaluation) -> dict[str, object]:
    """Returns an evaluation as a row of evaluations.json."""
    return {"step": evaluation.step, "heldout": evaluation.heldout.to_json(), "train": evaluation.train.to_json()}


def _texts_of(root: Path, step: int | str) -> Path:
    return root / f"heldout-{step}.jsonl"


def _link(source: str | Path, destination: str | Path) -> None:
    """Makes a hard link, or a copy where the disk has no links; run directories are never written to again."""
    try:
        os.link(source, destination)
    except OSError:
        shutil.copy2(source, destination)
