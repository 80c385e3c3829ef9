"""Lists what each stage needs and makes, prints that as a table, and finds conf/."""

import dataclasses
from pathlib import Path

from pipeline.config.choices import Stage

PACKAGE = Path(__file__).resolve().parents[1]
CONF = next((folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if folder.is_dir()), PACKAGE / "conf")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageInfo:
    """Says what a stage needs and makes; the stage is `pipeline/<stage>/stage.py`.

    One that people start often, for the same programs, `stores_programs` for its next start.
    """

    needs: str
    makes: str
    stores_programs: bool = False


STAGES = {
    Stage.target: StageInfo(
        needs="nothing, or a GPT-OSS directory",
        makes="the target as an HF directory",
    ),
    Stage.teacher_cache: StageInfo(
        needs="target",
        makes="the target's responses and their features",
    ),
    Stage.train: StageInfo(needs="target, teacher_cache", makes="checkpoints of the draft"),
    Stage.export: StageInfo(needs="target, train", makes="the draft as an HF directory"),
    Stage.serve: StageInfo(needs="target, export", makes="an OpenAI-style HTTP server", stores_programs=True),
    Stage.bench: StageInfo(
        needs="target, export",
        makes="acceptance and speedup against plain decoding",
    ),
    Stage.promote: StageInfo(
        needs="export, bench", makes="the draft a registered version, and the champion if it is best"
    ),
    Stage.plan: StageInfo(needs="nothing", makes="a list of what all would find, and of what it would make"),
    Stage.report: StageInfo(needs="bench", makes="a page that compares benchmarks of drafts"),
    Stage.ask: StageInfo(
        needs="target, export",
        makes="the served model's answers to a few questions, on the screen",
        stores_programs=True,
    ),
    Stage.compile: StageInfo(
        needs="nothing; the tpu extra",
        makes="what the programs need and cost on a TPU slice, without one",
    ),
    Stage.roofline: StageInfo(
        needs="nothing",
        makes="the target's own speed at its sizes, against the machine's bandwidth",
    ),
    Stage.feasibility: StageInfo(
        needs="nothing",
        makes="the speedup that any draft could give, and what making one costs",
    ),
    Stage.peer: StageInfo(
        needs="target",
        makes="plain decoding against another program's, on the same prompts",
    ),
    Stage.train_peer: StageInfo(
        needs="target, teacher_cache",
        makes="training steps and drafts against another trainer's, on the same batches",
    ),
    Stage.smoke: StageInfo(
        needs="nothing",
        makes="a random draft taken through export, serve and bench",
    ),
}

STAGES_OF_ALL = (Stage.target, Stage.teacher_cache, Stage.train, Stage.export, Stage.bench)


def stage_module(stage: Stage) -> str:
    """Returns the module of a stage, which has `run(config, tracker)`."""
    return f"pipeline.{stage.value}.stage"


def stage_table() -> str:
    """Returns the table of stages and the commands to begin with."""
    rows = [("stage", "needs", "makes")]
    rows += [(stage.value, info.needs, info.makes) for stage, info in STAGES.items()]
    rows.append(("all", "nothing", f"{', '.join(stage.value for stage in STAGES_OF_ALL)}, in this order"))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"{name:<{widths[0]}}  {needs:<{widths[1]}}  {makes}" for name, needs, makes in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(
        [
            *lines,
            "",
            "run one:         python -m pipeline stage=all",
            "change a value:  python -m pipeline stage=train train.steps=1000 train.learning_rate=1e-3",
            "several runs:    python -m pipeline --multirun stage=train train.learning_rate=1e-3,2e-3",
            f"choose:          experiment={'|'.join(choices('experiment'))}  target={'|'.join(choices('target'))}",
            "all values:      python -m pipeline --cfg job",
        ]
    )


def choices(group: str) -> list[str]:
    """Returns the names in a configuration group."""
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))
