"""Writes a trained draft as the directory that runtimes open."""

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

from pipeline.export.parity import Parity, require_parity
from pipeline.export.tensor_layout import require_layout
from pipeline.model.dflash.model import DraftModel
from pipeline.model.hf import safetensors_files
from pipeline.model.hf.directory import save_draft


def write_draft(directory: Path, draft: DraftModel, token_ids: Mapping[str, int]) -> Parity:
    """Writes a draft in bfloat16, then checks names, shapes, values and outputs of the files.

    Raises PipelineError when a check fails.
    """
    rounded = jax.tree.map(
        lambda array: array.astype(jnp.bfloat16), draft
    )  # the precision in which drafts are published
    save_draft(directory, rounded, dict(token_ids))
    require_layout(directory / safetensors_files.WEIGHTS_FILE, draft.config, "BF16")
    return require_parity(directory, draft)
