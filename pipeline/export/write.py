"""A trained draft as the directory that runtimes open."""

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

from pipeline.export.layout import require_layout
from pipeline.export.parity import Parity, require_parity
from pipeline.model import checkpoints, tensor_files
from pipeline.model.draft import DraftConfig, DraftWeights


def write_draft(directory: Path, config: DraftConfig, weights: DraftWeights, token_ids: Mapping[str, int]) -> Parity:
    """Write `weights` in bfloat16, then prove names, shapes, values and outputs from what was written.

    Raises PipelineError when the proof fails.
    """
    rounded = jax.tree.map(lambda array: array.astype(jnp.bfloat16), weights)  # what drafts are published in
    checkpoints.save_draft(directory, config, rounded, token_ids)
    require_layout(directory / tensor_files.WEIGHTS_FILE, config, "BF16")
    return require_parity(directory, config, weights)
