"""One flipped bit in a finished output_dir is named by the stage that reads the file, before that stage works with it.

Every file of a target, a teacher cache, a checkpoint and an exported draft is flipped at least once (`slow`: 200
flips). Each time the stages that read the artifact are run as far as their work: it never begins, except for files that
no stage reads again.
"""

import dataclasses
import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.artifacts import artifact
from pipeline.config.fields import CHECKPOINT, DRAFT, TARGET, TEACHER_CACHE
from pipeline.config.schema import PipelineConfig
from pipeline.errors import PipelineError
from pipeline.export import stage as export
from pipeline.serve import loading as serve_loading
from pipeline.teacher_cache import stage as teacher_cache
from pipeline.tracking.run import SilentRun
from pipeline.train import stage as train
from pipeline.workspace.workspace import Workspace
from tests.support import loop
from tests.support.damage import flip

SEED, NUM_FLIPS = 20, 200
# written for people, or to go on with a training that is over: no stage reads them again
UNREAD = {CHECKPOINT: ("run-", "logs/", "evaluations.json"), TEACHER_CACHE: ("prompts.jsonl",)}


class WorkBegan(Exception):
    """Raised where a stage would begin to compute."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> PipelineConfig:
    """A finished output_dir of every artifact, which each test leaves as it was."""
    root = tmp_path_factory.mktemp("finished") / "outputs"
    shutil.copytree(loop.trained().output_dir, root)
    config = loop.configuration(root)
    export.run(config, SilentRun())
    return config


@pytest.fixture
def stages(finished: PipelineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[], None]]:
    """What reads the artifact of each kind: the stages themselves, ended where they would compute."""

    def begin(*arguments: object) -> None:
        raise WorkBegan

    def read_batches(scratch: Path, workspace: Workspace, inputs: train.TrainInputs, tracker: object) -> None:
        batches = train._batches(inputs.splits["train"], workspace.config.train, workspace.config.seed)
        for step in range(batches.steps_per_epoch):
            batches.at(step)
        split = inputs.splits["heldout"]
        split.read(list(range(split.num_sequences)))
        raise WorkBegan

    monkeypatch.setattr(train, "_fit", read_batches)
    monkeypatch.setattr(export, "_check", begin)
    monkeypatch.setattr(serve_loading, "Engine", begin)
    elsewhere = {
        name: dataclasses.replace(getattr(finished, name), path=str(tmp_path / name)) for name in ("train", "export")
    }
    trains = dataclasses.replace(finished, train=elsewhere["train"])
    exports = dataclasses.replace(finished, export=elsewhere["export"])

    def serves() -> None:
        serve_loading.engine_of(Workspace(finished), with_draft=True)

    def reads_cache() -> None:
        teacher_cache.run(finished, SilentRun())  # which reports the summary of one that stands
        train.run(trains, SilentRun())

    return {
        TARGET: serves,
        TEACHER_CACHE: reads_cache,
        CHECKPOINT: lambda: export.run(exports, SilentRun()),
        DRAFT: serves,
    }


def _files(config: PipelineConfig) -> dict[Path, str]:
    """Every file of every artifact, with its artifact's kind."""
    found = {}
    for manifest in sorted(Path(config.output_dir).glob(f"*/*/{artifact.MANIFEST}")):
        kind = json.loads(manifest.read_text())["kind"]
        found |= {file: kind for file in sorted(manifest.parent.rglob("*")) if file.is_file()}
    return found


def _flips(config: PipelineConfig, count: int | None) -> Iterator[tuple[Path, str, int]]:
    """Files, their kinds and the bits to flip: one in every file, and more until there are `count`."""
    files, chance = _files(config), random.Random(SEED)
    chosen = list(files)
    while count is not None and len(chosen) < count:
        chosen.append(chance.choice(list(files)))
    for file in chosen:
        if file.stat().st_size:
            yield file, files[file], chance.randrange(8 * file.stat().st_size)


def _verdict(read: Callable[[], None], file: Path) -> str:
    """What a stage does with a flipped `file`."""
    try:
        read()
    except PipelineError as error:
        return "named" if file.name in str(error) else f"refused without the file's name: {error}"
    except WorkBegan:
        return "not noticed"
    except Exception as error:
        return f"a traceback: {error!r}"
    return "ended"


def _require_all_named(config: PipelineConfig, stages: dict[str, Callable[[], None]], count: int | None) -> None:
    wrong, verdicts = [], {"named": 0, "not read": 0}
    for file, kind, bit in _flips(config, count):
        name = file.relative_to(config.output_dir).as_posix()
        is_unread = name.split("/", 2)[2].startswith(UNREAD.get(kind, ()))
        flip(file, *divmod(bit, 8))
        try:
            verdict = _verdict(stages[kind], file)
        finally:
            flip(file, *divmod(bit, 8))
        if verdict == "named":
            verdicts["named"] += 1
        elif verdict == "not noticed" and is_unread:
            verdicts["not read"] += 1
        else:
            wrong.append(f"{name}, bit {bit}: {verdict}")
    print(f"{sum(verdicts.values())} flips: {verdicts}", file=sys.stderr)
    assert not wrong, "\n".join(wrong)
    assert verdicts["named"] > verdicts["not read"]


@pytest.mark.parametrize("kind", [TARGET, TEACHER_CACHE, CHECKPOINT, DRAFT])
def test_work_begins_on_whole_files(stages: dict[str, Callable[[], None]], kind: str) -> None:
    with pytest.raises(WorkBegan):
        stages[kind]()


def test_a_flipped_bit_in_each_file_is_named_before_any_work(
    finished: PipelineConfig, stages: dict[str, Callable[[], None]]
) -> None:
    _require_all_named(finished, stages, None)


@pytest.mark.slow
def test_200_flipped_bits_are_named_before_any_work(
    finished: PipelineConfig, stages: dict[str, Callable[[], None]]
) -> None:
    _require_all_named(finished, stages, NUM_FLIPS)
