"""How far apart logits are where a request gets two answers: batches, pages, chunks and blocks round otherwise.

    python -m tests.tie_gaps [OVERRIDE ...]

reads the target and the draft that `stage=all` made with these overrides (without a draft, one of random weights
proposes the blocks), decodes the held-out prompts greedily in bfloat16 at one slot, and again at other sizes, and
prints for each the answers that differ and the gaps between the target's two best logits there. The bounds of
`pipeline/engine/ties.py` come from its numbers.
"""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp

from pipeline.bench import loading, losslessness, workload
from pipeline.bench.engine_arm import EngineArm
from pipeline.config.choices import Precision
from pipeline.config.fields import DRAFT
from pipeline.engine.engine import Engine
from pipeline.engine.ties import TIE_GAP
from pipeline.errors import MissingArtifact, PipelineError
from pipeline.model.dflash import weights as dflash_weights
from pipeline.model.dflash.model import DraftModel
from pipeline.workspace.loading import load_target, runtime_for
from pipeline.workspace.workspace import Workspace
from tests.support.configuration import composed

SETTINGS = {
    "8 slots": {"num_slots": 8},
    "32 slots": {"num_slots": 32},
    "pages of 16": {"page_size": 16},
    "pages of 128": {"page_size": 128},
    "chunks of 16": {"prefill_chunk": 16},
    "chunks of 256": {"prefill_chunk": 256},
    "DFLASH": {},
    "DFLASH, 8 slots": {"num_slots": 8},
    "DFLASH, 32 slots": {"num_slots": 32},
}


def random_models(workspace):
    """The target, a draft of random weights, and their runtime."""
    runtime = runtime_for(workspace.config.mesh, workspace.target.path)
    target = load_target(workspace.config.target, workspace.target.path, runtime)
    shape = workspace.draft_config
    weights = dflash_weights.random_weights(shape, jax.random.key(0))
    return target, DraftModel(shape, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), weights)), runtime


def main(overrides):
    config = composed(*overrides)
    try:
        exported = Workspace(config).open(DRAFT)
    except MissingArtifact:
        exported = None
    config.target.precision = Precision.bfloat16
    workspace = Workspace(config)
    prompts = workload.held_out(workspace.prompts.prompts, config.prompts.heldout_fraction)
    requests = loading.requests_for(workspace, loading.rendered(workspace, prompts))
    target, draft, runtime = (
        random_models(workspace) if exported is None else loading.Models(workspace, exported).loaded
    )
    sizes = dataclasses.replace(loading.engine_sizes(workspace, requests), num_slots=1)

    def answers(has_draft, **changes):
        arm = EngineArm(Engine(target, draft if has_draft else None, dataclasses.replace(sizes, **changes), runtime))
        arm.warm_up()
        return arm.run(requests).answers

    first = answers(has_draft=False)
    compared = functools.partial(losslessness.compare_answers, first, requests=requests, target=target, runtime=runtime)
    print(f"{config.target.name}, bfloat16, {len(requests)} prompts; a tie is below {TIE_GAP['bfloat16']}")
    print(f"{'compared with 1 slot':<20}{'equal':>7}{'differ':>8}{'largest gap':>13}  gaps")
    for name, changes in SETTINGS.items():
        found = compared(answers(has_draft=name.startswith("DFLASH"), **changes))
        gaps = sorted((one.logit_gap for one in found.differences), reverse=True)
        shown = " ".join(f"{gap:.3f}" for gap in gaps[:6])
        print(f"{name:<20}{found.num_equal:>7}{len(gaps):>8}{max(gaps, default=0.0):>13.4f}  {shown}", flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except PipelineError as error:
        raise SystemExit(f"error: {error}") from error
