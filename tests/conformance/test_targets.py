"""transformers 4 and 5 open a target as the product writes it, and compute its logits."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipeline.model.gpt_oss import forward as gpt_oss
from pipeline.model.gpt_oss import weights as gpt_oss_weights
from pipeline.model.gpt_oss.config import GptOssConfig
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.hf.directory import read_target, save_target
from pipeline.model.layers.rope import Rope
from tests.support import models as tiny_models
from tests.support.environments import told_by

pytestmark = [pytest.mark.conformance, pytest.mark.slow]  # each in an environment of its own

TOLERANCE = 1e-4
TOKEN_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
VERSIONS = {"transformers4": "4.57.6", "speculators": "5.19.0"}
YARN = GptOssConfig.from_hf(tiny_models.TARGET)
TARGETS = {  # the tiny target has YaRN, SmolLM2 plain RoPE and a limit that no activation reaches
    "YaRN": YARN,
    "plain": dataclasses.replace(YARN, rope=Rope(theta=1e4), swiglu_limit=1000.0),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """Targets as `stage=target` writes them, the inputs, and our logits."""
    root = tmp_path_factory.mktemp("targets")
    ids = np.random.default_rng(3).integers(0, YARN.vocab_size, (2, 43)).astype(np.int32)
    np.savez(root / "in.npz", input_ids=ids)
    for name, config in TARGETS.items():
        (root / name).mkdir()
        save_target(
            root / name, TargetModel(config, gpt_oss_weights.random_weights(config, jax.random.key(1))), TOKEN_IDS
        )
        target = read_target(root / name, gpt_oss_weights.WeightFormat())
        hidden = jax.jit(gpt_oss.forward)(target, ids, jnp.zeros(len(ids), jnp.int32), None).hidden
        np.save(root / f"{name}.npy", gpt_oss.logits(target.weights, hidden))
    return root


def furthest(environment: str, written: Path, name: str, directory: Path, outputs: Path) -> tuple[dict, float]:
    """What transformers tells of the RoPE in `directory`, and the largest difference of its logits from ours."""
    told = told_by(environment, "target_logits", target=directory, inputs=written / "in.npz", outputs=outputs)
    assert told["version"] == VERSIONS[environment]
    wanted = np.load(written / f"{name}.npy")
    assert wanted.std() > 0.5
    return told["rope"], float(np.abs(np.load(outputs)["logits"] - wanted).max())


@pytest.mark.parametrize("environment", VERSIONS)
@pytest.mark.parametrize("name", TARGETS)
def test_transformers_reads_the_rope_of_a_target_and_computes_its_logits(written, tmp_path, environment, name):
    rope, difference = furthest(environment, written, name, written / name, tmp_path / "out.npz")
    assert rope.items() >= TARGETS[name].rope.to_hf().items()
    assert difference < TOLERANCE


@pytest.mark.parametrize("name", TARGETS)
def test_transformers_4_computes_otherwise_without_the_older_spelling(written, tmp_path, name):
    broken = Path(shutil.copytree(written / name, tmp_path / "broken"))
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling")})
    )
    _, difference = furthest("transformers4", written, name, broken, tmp_path / "out.npz")
    assert difference > 100 * TOLERANCE
