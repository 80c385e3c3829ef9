"""A random target and a draft fitted to some of its text, both written by torch, and the prompts they are tried on.

A random draft is almost always rejected; of one that knows a part of the text nothing, a few tokens or a whole block
are accepted, so that commits and roll-backs of every size happen. The two are made once for all test files.
"""

import dataclasses
import functools
import json
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from pipeline.model.dflash.model import DraftModel
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.gpt_oss.weights import WeightFormat
from pipeline.model.hf.directory import read_draft, read_target
from tests.support import models as tiny_models
from tests.support import once
from tests.support.oracles import run_oracle

BLOCK_SIZE, MASK_TOKEN_ID = 6, 96
DRAFT = {
    "architectures": ["DFlashDraftModel"],
    "model_type": "qwen3",
    "vocab_size": tiny_models.TARGET["vocab_size"],
    "hidden_size": tiny_models.TARGET["hidden_size"],
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "rms_norm_eps": 1e-5,
    "layer_types": ["full_attention"] * 2,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 2,
    "max_position_embeddings": tiny_models.TARGET["max_position_embeddings"],
    "rope_theta": 1e6,
    "rope_scaling": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "num_target_layers": tiny_models.TARGET["num_hidden_layers"],
    "block_size": BLOCK_SIZE,
    "tie_word_embeddings": False,
    "dflash_config": {
        "block_size": BLOCK_SIZE,
        "mask_token_id": MASK_TOKEN_ID,
        "target_layer_ids": [0, 2],
        "causal": False,
    },
}
MAX_NEW_TOKENS = 48
STOP_TOKEN_IDS = (5, 71)
NUM_PROMPTS, NUM_FITTED = 32, 16
FIT_STEPS = 60


@dataclasses.dataclass(frozen=True)
class Fitted:
    """The two on disk and in float32, and the prompts; the draft knows the answers to the first few."""

    target_path: Path
    draft_path: Path
    target: TargetModel
    draft: DraftModel
    prompts: list[list[int]]


@functools.cache
def fitted() -> Fitted:
    """Read only."""
    root = once.directory("fitted", _make)
    target, draft = read_target(root / "target", WeightFormat()), read_draft(root / "draft", jnp.float32)
    return Fitted(root / "target", root / "draft", target, draft, prompts())


def _make(root: Path) -> None:
    (root / "target.json").write_text(json.dumps(tiny_models.TARGET))
    (root / "draft.json").write_text(json.dumps(DRAFT))
    run_oracle("make_gpt_oss", config=root / "target.json", seed=1, out=root / "target")
    run_oracle("make_draft", config=root / "draft.json", seed=2, out=root / "random")
    request = request_of(prompts()[:NUM_FITTED])
    (root / "in.json").write_text(json.dumps(request))
    run_oracle(
        "fit_draft",
        target=root / "target",
        draft=root / "random",
        inputs=root / "in.json",
        steps=FIT_STEPS,
        out=root / "draft",
    )


def prompts() -> list[list[int]]:
    """Of 1 to 41 tokens, most of them longer than the target's window."""
    random = np.random.default_rng(0)
    lengths = [1, 41, *random.integers(2, 40, NUM_PROMPTS - 2)]
    return [random.integers(0, MASK_TOKEN_ID, length).tolist() for length in lengths]


def request_of(chosen: list[list[int]]) -> dict[str, object]:
    """What the generating oracles read."""
    return {"prompts": chosen, "max_new_tokens": MAX_NEW_TOKENS, "stop_token_ids": list(STOP_TOKEN_IDS)}


def ask(oracle: str, request: dict[str, object], **directories: Path) -> list[dict[str, list]]:
    """What a generating oracle answers to each prompt."""
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = Path(folder) / "in.json", Path(folder) / "out.json"
        inputs.write_text(json.dumps(request))
        run_oracle(oracle, **directories, inputs=inputs, outputs=outputs)
        return json.loads(outputs.read_text())["outputs"]
