"""Loads what is served: the target, its draft, and the engine that runs them."""

import dataclasses
from pathlib import Path

from pipeline import distributed
from pipeline.engine.engine import Engine
from pipeline.engine.multihost import PrimaryEngine
from pipeline.errors import PipelineError
from pipeline.workspace.loading import load_draft, load_target, runtime_for
from pipeline.workspace.workspace import DRAFT, Workspace


def engine_with(engine: Engine, workspace: Workspace) -> Engine:
    """Returns a warm engine beside another one of this target, with the draft that the workspace finds."""
    path = Path(str(workspace.open(DRAFT).path))
    runtime = runtime_for(workspace.config.mesh, workspace.target.path, draft=path)
    replacing = engine.with_draft(load_draft(workspace.config.target.precision, path, runtime))
    replacing.warm_up()
    return replacing


def engine_of(workspace: Workspace, *, with_draft: bool, adapts: bool = True) -> Engine:
    """Returns the engine that serves this configuration's target, with its draft or alone, not warmed up.

    Unless it `adapts`, every block has the draft's own size and every step all slots. Of several hosts the primary
    gets one that the others follow. Raises PipelineError when `engine.max_length` is above the target's positions.
    """
    config, target = workspace.config, workspace.target
    engine = workspace.serving_engine
    if not adapts:
        engine = dataclasses.replace(engine, block_sizes=(), row_counts=())
    limit = workspace.model.max_position_embeddings
    if engine.max_length > limit:  # before the weights are read
        raise PipelineError(
            f"engine.max_length is {engine.max_length}; {config.target.name} has {limit} positions "
            f"(max_position_embeddings); set engine.max_length to {limit} or less"
        )
    draft_path = Path(str(workspace.open(DRAFT).path)) if with_draft else None  # drafts are never in buckets
    runtime = runtime_for(config.mesh, target.path, draft=draft_path)
    model = load_target(config.target, target.path, runtime)
    draft = None if draft_path is None else load_draft(config.target.precision, draft_path, runtime)
    kind = PrimaryEngine if distributed.is_multihost() and distributed.is_primary() else Engine
    return kind(model, draft, engine, runtime)
