"""Which of a training's checkpoints is the best: the one with the highest accept_length on held-out texts.

Every evaluation is written down beside the run directories, and the best one's run directory is kept under
`best/`, where EasyDeL does not look for one to go on from. The held-out texts with the rounds over them are written
before the evaluation, for only the best one's are kept. A kill between any two of these steps is made good by `keep`,
which looks at what is written down alone.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from pipeline import artifacts, hosts
from pipeline.artifacts import PipelineError
from pipeline.dflash import scored
from pipeline.train import runs
from pipeline.train.score import Score

EVALUATIONS, BEST = "evaluations.json", "best"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a draft scores behind a step, on held-out texts and on as many that it was trained on."""

    step: int
    heldout: Score
    train: Score


def read(root: Path) -> list[Evaluation]:
    """The evaluations of the training in `root`, in order."""
    file = root / EVALUATIONS
    rows = json.loads(file.read_text()) if file.is_file() else []
    return [Evaluation(row["step"], Score.from_json(row["heldout"]), Score.from_json(row["train"])) for row in rows]


def add(root: Path, step: int, scores: Mapping[str, Score]) -> Evaluation:
    """Write an evaluation down and keep the run directory of its step if it is the best so far."""
    new = Evaluation(step, scores["heldout"], scores["train"])
    if hosts.is_first():
        before = [one for one in read(root) if one.step < step]  # a training may have been set back to a checkpoint
        artifacts.write_bytes(_texts_of(root, step), scored.to_lines(new.heldout.texts))
        artifacts.write_json(root / EVALUATIONS, [as_json(one) for one in (*before, new)])
        keep(root)
    return new


def of(evaluations: list[Evaluation]) -> Evaluation:
    """The best one; the earlier of two equals."""
    return max(evaluations, key=lambda one: one.heldout.total.accept_length)


def keep(root: Path) -> None:
    """See to it that `best/` holds the best evaluation's run directory and no other."""
    evaluations = read(root)
    if not evaluations:
        return
    wanted = runs.path_of(root / BEST, of(evaluations).step)
    if not (wanted / runs.COMPLETE).is_file():
        source = runs.path_of(root, of(evaluations).step)
        shutil.rmtree(wanted, ignore_errors=True)
        shutil.copytree(source, wanted, copy_function=_link, ignore=shutil.ignore_patterns(runs.COMPLETE))
        _link(source / runs.COMPLETE, wanted / runs.COMPLETE)
    runs.keep_only(root / BEST, wanted)
    texts = _texts_of(root, of(evaluations).step)
    for other in root.glob(_texts_of(root, "*").name):
        if other != texts:
            other.unlink()


def take(root: Path) -> Evaluation:
    """End a training: leave the best run directory as the only one in `root`; tells its evaluation.

    The held-out texts of that evaluation are left as `scored.FILE`.
    """
    best = of(read(root))
    kept, final = runs.path_of(root / BEST, best.step), runs.path_of(root, best.step)
    if kept.exists():
        shutil.rmtree(final, ignore_errors=True)
        os.rename(kept, final)
    if not (final / runs.COMPLETE).is_file():
        raise PipelineError(f"{root} holds no run directory of step {best.step}; delete it and train again")
    runs.keep_only(root, final)
    shutil.rmtree(root / BEST, ignore_errors=True)
    texts = _texts_of(root, best.step)
    if texts.exists():
        os.rename(texts, root / scored.FILE)
    if not (root / scored.FILE).is_file():
        raise PipelineError(f"{root} holds no texts of step {best.step}'s evaluation; delete it and train again")
    return best


def as_json(one: Evaluation) -> dict[str, object]:
    """As a row of evaluations.json."""
    return {"step": one.step, "heldout": one.heldout.to_json(), "train": one.train.to_json()}


def _texts_of(root: Path, step: int | str) -> Path:
    return root / f"heldout-{step}.jsonl"


def _link(source: str | Path, destination: str | Path) -> None:
    """A second name for the same bytes where the disk has such; run directories are never written to again."""
    try:
        os.link(source, destination)
    except OSError:
        shutil.copy2(source, destination)
