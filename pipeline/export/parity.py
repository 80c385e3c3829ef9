"""Checks that a written draft is the trained one: equal weights in bfloat16, and outputs within its precision."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pipeline.dflash import blocks
from pipeline.errors import PipelineError
from pipeline.model.dflash import forward as dflash
from pipeline.model.dflash.model import DraftModel
from pipeline.model.hf.directory import read_draft, weight_paths

NUM_POSITIONS, NUM_BLOCKS = 40, 5
MAX_RELATIVE_ERROR = 2e-2  # of outputs, root mean square; bfloat16 keeps 8 bits of each weight


@dataclasses.dataclass(frozen=True)
class Parity:
    """Holds the largest and the relative RMS difference of float32 outputs, written weights against trained ones."""

    max_difference: float
    relative_error: float


def require_parity(directory: Path, trained: DraftModel) -> Parity:
    """Reads the written draft back and compares it. Raises PipelineError naming everything that differs."""
    written = read_draft(directory, jnp.float32)
    found, config = written.config, trained.config
    wrong = [
        f"{field.name}: {getattr(found, field.name)!r}, wanted {getattr(config, field.name)!r}"
        for field in dataclasses.fields(config)
        if getattr(found, field.name) != getattr(config, field.name)
    ]
    if not wrong:
        pairs = zip(weight_paths(trained.weights), weight_paths(written.weights), strict=True)
        wrong = [
            f"{path}: not the trained weight rounded to bfloat16"
            for (path, wanted), (_, array) in pairs
            if not bool((wanted.astype(jnp.bfloat16).astype(jnp.float32) == array).all())
        ]
    if wrong:
        raise PipelineError(f"{directory} is not the draft that was trained:\n  " + "\n  ".join(wrong))
    wanted, outputs = _outputs(trained), _outputs(written)
    difference = outputs - wanted
    relative = float(jnp.sqrt(jnp.square(difference).mean() / jnp.square(wanted).mean()))
    if not relative <= MAX_RELATIVE_ERROR:
        raise PipelineError(
            f"outputs of {directory} differ from the trained draft's by {relative:.2e} (relative RMS), wanted at "
            f"most {MAX_RELATIVE_ERROR:.0e}; the weights do not survive bfloat16: train with a lower learning rate"
        )
    return Parity(float(jnp.abs(difference).max()), relative)


@jax.jit
def _outputs(draft: DraftModel) -> Float[Array, "1 A K D"]:
    """Returns final hidden states of a few blocks over random features."""
    config = draft.config
    keys = jax.random.split(jax.random.key(0), 2)
    positions = jnp.arange(NUM_POSITIONS)[None]
    features = jax.random.normal(keys[0], (1, NUM_POSITIONS, config.feature_size))
    anchors = jnp.linspace(1, NUM_POSITIONS, NUM_BLOCKS, dtype=jnp.int32)[None]
    block = blocks.block_positions(anchors, config.block_size)
    embeddings = jax.random.normal(keys[1], (*block.shape, config.hidden_size))
    context = dflash.context(draft, features, positions)
    visible = blocks.context_visible(anchors, NUM_POSITIONS)
    return dflash.denoise_blocks(draft, embeddings, block, context, visible)
