"""Stages over a mesh of several devices cache, answer and measure what they do on one device."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_models
from stages_on_a_mesh import configuration

from pipeline import artifacts, lineage
from pipeline.model import checkpoints, draft
from pipeline.model.gpt_oss_config import GptOssConfig
from pipeline.model.gpt_oss_weights import random_weights
from pipeline.prompts import corpus
from pipeline.prompts.tokenizer import train_tokenizer

HERE = Path(__file__).resolve().parent
FEATURE_ROUNDING = 0.02  # bfloat16 keeps 8 bits, and a sum over a text may catch several that round the other way


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A random target whose sizes eight devices divide, with a tokenizer, and a random draft of it."""
    root = tmp_path_factory.mktemp("models")
    target, drafted = root / "target", root / "draft"
    target.mkdir()
    sizes = GptOssConfig.from_hf({**tiny_models.SPLIT_TARGET, "vocab_size": 320})
    checkpoints.save_target(target, sizes, random_weights(sizes, jax.random.key(0)), {})
    texts = [corpus.conversation(0, index, "low").prompt for index in range(200)]
    train_tokenizer(texts, 320).save_pretrained(target)
    config = configuration(str(root), str(target), str(drafted))
    read = lineage.target(config)
    shape = lineage.draft_config(config, read)
    weights = draft.random_weights(shape, jax.random.key(1))
    checkpoints.save_draft(artifacts.open_scratch(drafted, resume=False), shape, weights, {})
    contract = lineage.draft_contract(config, read, {}).to_json()
    artifacts.seal(drafted, kind=lineage.DRAFT, settings={}, contract=contract)
    return target, drafted


def told(models, output_dir, mesh):
    command = [sys.executable, str(HERE / "stages_on_a_mesh.py"), str(output_dir), *map(str, models), mesh]
    num_devices = math.prod(map(int, mesh.split("x")))
    environment = os.environ | {
        "PYTHONPATH": str(HERE.parent),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}",
    }
    made = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert made.returncode == 0, made.stderr[-4000:]
    return json.loads(made.stdout.splitlines()[-1])


def test_a_mesh_samples_answers_caches_them_and_measures_what_one_device_does(models, tmp_path):
    alone, split = (told(models, tmp_path / mesh, mesh) for mesh in ("1x1x1", "2x2x2"))
    assert split["answers"] == alone["answers"]
    assert len(alone["answers"]) > 3
    for here, there in zip(split["features"], alone["features"], strict=True):
        np.testing.assert_allclose(here, there, rtol=FEATURE_ROUNDING, atol=FEATURE_ROUNDING * np.std(there))
    assert split["measured"] == alone["measured"]
    assert alone["measured"]["equal_answers"] == 4
