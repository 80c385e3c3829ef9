"""Stages over a mesh of several devices cache, answer and measure what they do on one device."""

import json
import math
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from pipeline.model.gpt_oss.config import GptOssConfig
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.gpt_oss.weights import random_weights
from pipeline.model.hf.directory import save_target
from pipeline.prompts import corpus
from pipeline.prompts.tokenizer import train_tokenizer
from tests.support import models as tiny_models
from tests.support.compiled import QUICKLY
from tests.support.paths import PROGRAMS, ROOT
from tests.support.programs.stages_on_a_mesh import configuration
from tests.support.served import seal_random_draft

FEATURE_ROUNDING = 0.02  # bfloat16 keeps 8 bits, and a sum over a text may catch several that round the other way


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A random target whose sizes eight devices divide, with a tokenizer, and a random draft of it."""
    root = tmp_path_factory.mktemp("models")
    target, drafted = root / "target", root / "draft"
    target.mkdir()
    sizes = GptOssConfig.from_hf({**tiny_models.SPLIT_TARGET, "vocab_size": 320})
    save_target(target, TargetModel(sizes, random_weights(sizes, jax.random.key(0))), {})
    texts = [corpus.conversation(0, index, "low").prompt for index in range(200)]
    train_tokenizer(texts, 320).save_pretrained(target)
    seal_random_draft(configuration(str(root), str(target), str(drafted)))
    return target, drafted


def measured(models, output_dir, mesh):
    command = [sys.executable, str(PROGRAMS / "stages_on_a_mesh.py"), str(output_dir), *map(str, models), mesh]
    num_devices = math.prod(map(int, mesh.split("x")))
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}",
        **QUICKLY,
    }
    made = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert made.returncode == 0, made.stderr[-4000:]
    return json.loads(made.stdout.splitlines()[-1])


def test_a_mesh_samples_answers_caches_them_and_measures_what_one_device_does(models, tmp_path):
    alone, split = (measured(models, tmp_path / mesh, mesh) for mesh in ("1x1x1", "2x2x2"))
    assert split["answers"] == alone["answers"]
    assert len(alone["answers"]) > 3
    for found, wanted in zip(split["features"], alone["features"], strict=True):
        np.testing.assert_allclose(found, wanted, rtol=FEATURE_ROUNDING, atol=FEATURE_ROUNDING * np.std(wanted))
    assert split["measured"] == alone["measured"]
    assert alone["measured"]["equal_answers"] == 4
