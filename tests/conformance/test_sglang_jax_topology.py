"""This project's GPT-OSS for sglang-jax, at gpt-oss-20b's sizes, through the compiler of a TPU that is not there."""

import json

import pytest
from omegaconf import OmegaConf

from pipeline.config.schema import ArchitectureConfig
from pipeline.workspace import specs
from tests.support.environments import told_by
from tests.support.paths import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.conformance]

HBM_BYTES = {"v6e:2x4": 31.25 * 2**30, "v5e:2x4": 15.75 * 2**30}  # of a chip, that a program may have


@pytest.mark.parametrize(("topology", "tokens"), [("v6e:2x4", 1), ("v6e:2x4", 8), ("v5e:2x4", 8)])
def test_a_pass_compiles_with_the_engines_kernels_and_fits(tmp_path, topology, tokens):
    loaded = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "target" / "gpt_oss_20b.yaml"))
    sizes = specs.architecture(ArchitectureConfig(**loaded["target"]["architecture"]))
    (tmp_path / "config.json").write_text(json.dumps({**sizes.to_hf(), "dtype": "bfloat16"}))
    options = {"config": tmp_path, "topology": topology, "tokens-per-request": tokens}
    found = told_by("sglang_server", "sglang_jax_topology", **options)
    assert found["kernels"] == ["RPAd", "RPAm", "gmm_v2"]  # paged attention with sinks, and grouped products
    assert found["chips"] == 8
    needed = found["argument_bytes"] + found["temporary_bytes"] + found["output_bytes"]
    assert needed < HBM_BYTES[topology]
