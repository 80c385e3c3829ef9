"""What a stage's run is called in MLflow, and the parameters by which runs are compared."""

import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path

from pipeline.artifacts import provenance
from pipeline.config import fields
from pipeline.config.choices import Stage
from pipeline.config.schema import PipelineConfig, plain
from pipeline.tracking.run import RunInfo

NOT_COMPARED = ("output_dir", "stage", "verify", "tracking.")  # where a run went, not what it measured
GROUPS = {Stage.train: ("train.", "draft."), Stage.ask: ("ask.",), Stage.teacher_cache: ("teacher_cache.", "prompts.")}


def run_info(config: PipelineConfig, parent_run_id: str | None, tags: Mapping[str, str]) -> RunInfo:
    """Returns what describes a stage's run; `tags` are added to those that every run has."""
    assert config.stage is not None, "a command without a stage lists the stages"
    return RunInfo(
        name=run_name(config, time.strftime("%d %b %H:%M")),
        config=plain(config),
        params=run_params(config),
        tags={**_tags(config, config.stage.value), **tags},
        parent_run_id=parent_run_id,
    )


def sweep_info(config: PipelineConfig, swept: Mapping[str, str]) -> RunInfo:
    """Returns what describes the run of a sweep; `swept` has the values of each setting that its members differ in."""
    stage = "" if config.stage is None or "stage" in swept else config.stage.value
    words = [f"sweep {stage}".strip(), config.target.name, *swept]
    return RunInfo(
        name=", ".join([*words, time.strftime("%d %b %H:%M")]),
        config=plain(config),
        params=swept,
        tags=_tags(config, "sweep"),
    )


def _tags(config: PipelineConfig, stage: str) -> dict[str, str]:
    return {
        "mlflow.source.git.commit": provenance.git_commit(),
        "stage": stage,
        "target": config.target.name,
        "version": provenance.version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def run_name(config: PipelineConfig, now: str) -> str:
    """Returns stage, target, recipe and time, in a few words: what tells a run from others in a table."""
    assert config.stage is not None, "a command without a stage lists the stages"
    words = [config.stage.value, config.target.name]
    if config.stage is Stage.train:
        train, draft = config.train, config.draft
        words.append(f"{train.steps} steps {train.optimizer.value} {train.learning_rate:g}")
        words.append(f"block {draft.block_size} layers {draft.num_hidden_layers}")
    if config.stage is Stage.teacher_cache and config.prompts.path is not None:
        words.append(Path(config.prompts.path).name)
    return ", ".join([" ".join(words[:2]), *words[2:], now])


def run_params(config: PipelineConfig) -> dict[str, object]:
    """Returns the parameters: the stage's own settings, and of the others those that are not at their default.

    All of them are in the run's config.yaml; a dump of everything would hide what differs.
    """
    assert config.stage is not None, "a command without a stage lists the stages"
    defaults = {leaf.name: plain(leaf.value) for leaf in fields.leaves(PipelineConfig())}
    own = GROUPS.get(config.stage, (f"{config.stage.value}.",))
    found: dict[str, object] = {"target": config.target.name}
    for leaf in fields.leaves(config):
        value = plain(leaf.value)
        is_own = leaf.name.startswith(own)
        if leaf.name.startswith(NOT_COMPARED) or not (is_own or value != defaults.get(leaf.name)):
            continue
        if value is not None:
            found[leaf.name] = value
    return found
