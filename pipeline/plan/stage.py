"""`stage=plan`: what `stage=all` would find and what it would make, where, how large, and how long it took before."""

import dataclasses
import logging
import math
from pathlib import Path

import jax
import jax.numpy as jnp

from pipeline.artifacts import artifact
from pipeline.config.fields import CHECKPOINT, DRAFT, TARGET, TEACHER_CACHE
from pipeline.config.schema import PipelineConfig
from pipeline.errors import PipelineError
from pipeline.model.dflash.config import DFlashConfig
from pipeline.model.placement import draft_shapes
from pipeline.store.layout import CacheLayout
from pipeline.tracking import reading
from pipeline.tracking.run import Run
from pipeline.workspace.settings import feature_store
from pipeline.workspace.workspace import STAGE_OF, Workspace

log = logging.getLogger("pipeline")

EXPORTED_BYTES, TRAINED_BYTES = 2, 12  # of a parameter: bfloat16; float32 with an optimizer's two moments


@dataclasses.dataclass(frozen=True)
class Planned:
    """Holds a line of the plan: a stage, where its artifact is or will be, and what is known of it."""

    stage: str
    where: str
    state: str
    size: str


def run(config: PipelineConfig, tracker: Run) -> list[Planned]:
    """Prints a line for every artifact of this configuration; makes nothing."""
    workspace = Workspace(config)
    found = [_planned(workspace, kind) for kind in (TARGET, TEACHER_CACHE, CHECKPOINT, DRAFT)]
    rows = [("stage", "state", "at most", "took before", "where")]
    for one in found:
        seconds = reading.last_seconds(
            one.stage, config.target.name, uri=config.tracking.uri, output_dir=Path(config.output_dir)
        )
        rows.append((one.stage, one.state, one.size, "" if seconds is None else f"{seconds:.0f} s", one.where))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    print("\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]]), flush=True)
    return found


def _planned(workspace: Workspace, kind: str) -> Planned:
    stage = STAGE_OF[kind]
    if kind == TARGET and workspace.config.target.path is not None:
        return Planned(stage, workspace.config.target.path, "is given", "")
    try:
        path = workspace.address(kind)
        stands, size = artifact.exists(path), _size(workspace, kind)
    except PipelineError:  # the others are named by the target's own sizes
        return Planned(stage, "named when the target is there", "to be made", "")
    begun = isinstance(path, Path) and artifact.scratch_of(path).exists()
    state = "stands" if stands else "begun, goes on" if begun else "to be made"
    return Planned(stage, str(path), state, size)


def _size(workspace: Workspace, kind: str) -> str:
    """Returns what an artifact takes on disk, at most or about, for people."""
    if kind == TARGET:
        return ""
    draft, config = workspace.draft_config, workspace.config
    if kind == TEACHER_CACHE:
        cache = config.teacher_cache
        layout = CacheLayout(
            stored=feature_store(config).value, feature_size=draft.feature_size, num_tapped=len(draft.tapped_layers)
        )
        count = config.prompts.count or len(workspace.prompts.prompts)
        return _bytes(count * (cache.max_prompt_tokens + cache.max_new_tokens) * layout.token_bytes)
    return _bytes(_num_parameters(draft) * (TRAINED_BYTES if kind == CHECKPOINT else EXPORTED_BYTES))


def _num_parameters(draft: DFlashConfig) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(draft_shapes(draft, jnp.dtype(jnp.float32))))


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
