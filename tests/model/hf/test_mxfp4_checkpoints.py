"""MXFP4 checkpoints in OpenAI's layout, written by NVIDIA's Model Optimizer, against transformers' own reading."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from oracle_environment import run_oracle
from safetensors.numpy import load_file, save_file

from pipeline.artifacts import PipelineError
from pipeline.model import checkpoints, gpt_oss
from pipeline.model.execution import PLAIN, Execution, Kernels
from pipeline.model.gpt_oss_weights import WeightsForm

TOLERANCE = 1e-4
CASES = {"experts wide": tiny_models.PACKED_TARGET, "experts apart": tiny_models.WIDE_PACKED_TARGET}
step = jax.jit(gpt_oss.forward, static_argnames=("config", "tapped_layers", "run"))
PACKED, EXPANDED = WeightsForm(packed=True), WeightsForm()


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def published(request, tmp_path_factory):
    """A packed checkpoint of several files, the floats it was made of, and what transformers computes with it."""
    root = tmp_path_factory.mktemp("mxfp4")
    (root / "wanted.json").write_text(json.dumps(request.param))
    run_oracle("make_gpt_oss", config=root / "wanted.json", seed=5, out=root / "floats")
    run_oracle("pack_mxfp4", model=root / "floats", out=root / "packed", shards=3)
    ids = np.random.default_rng(0).integers(0, request.param["vocab_size"], (3, 29)).astype(np.int32)
    np.savez(root / "in.npz", input_ids=ids)
    run_oracle("gpt_oss_forward", model=root / "packed", inputs=root / "in.npz", outputs=root / "out.npz")
    return root, ids, dict(np.load(root / "out.npz"))


def outputs_of(directory, ids, form, run=PLAIN):
    config, weights = checkpoints.load_target(directory, form)
    taps = tuple(range(config.num_hidden_layers))
    out = step(weights, config, ids, jnp.zeros(len(ids), jnp.int32), None, taps, run=run)
    return gpt_oss.logits(weights, out.hidden), out.features


@pytest.mark.parametrize("form", [PACKED, EXPANDED], ids=["packed", "expanded"])
@pytest.mark.parametrize("few_tokens", [0, 999], ids=["grouped", "few"])
def test_logits_and_features_equal_those_of_the_dequantised_model(published, form, few_tokens):
    root, ids, expected = published
    logits, features = outputs_of(root / "packed", ids, form, Execution(few_tokens=few_tokens))
    assert expected["logits"].std() > 1
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=TOLERANCE)
    wanted = np.moveaxis(expected["features"], 0, -2).reshape(features.shape)
    np.testing.assert_allclose(features, wanted, rtol=0, atol=TOLERANCE)


def test_packed_and_expanded_in_bfloat16_agree_within_its_rounding(published):
    """The values are the same; only sums are taken in another order, and rounded where bfloat16 rounds."""
    root, ids, expected = published
    floats = [outputs_of(root / "packed", ids, WeightsForm("bfloat16", packed))[0] for packed in (True, False)]
    errors = [np.sqrt(np.square(logits - expected["logits"]).mean()) for logits in floats]
    apart = np.sqrt(np.square(floats[0] - floats[1]).mean())
    assert apart <= max(errors)  # no further from each other than from the exact logits
    assert max(errors) <= 0.05 * expected["logits"].std()


def test_the_tpu_kernels_give_the_packed_logits(published):
    root, ids, expected = published
    run = Execution(kernels=Kernels.pallas_interpreted, few_tokens=999)
    logits, _ = outputs_of(root / "packed", ids[:1, :5], WeightsForm("bfloat16", packed=True), run)
    plain, _ = outputs_of(root / "packed", ids[:1, :5], WeightsForm("bfloat16", packed=True))
    np.testing.assert_allclose(logits, plain, rtol=0, atol=0.1 * expected["logits"].std())


def test_packed_experts_take_about_half_a_byte_a_parameter(published):
    root, _, _ = published
    config, weights = checkpoints.load_target(root / "packed", PACKED)
    experts = weights.layers[0].experts
    held = sum(leaf.nbytes for matrix in (experts.gate, experts.up, experts.down) for leaf in jax.tree.leaves(matrix))
    parameters = 3 * config.num_local_experts * PACKED.packed_rows(config.intermediate_size) * config.hidden_size
    assert held / parameters == 0.5 + 1 / 32


def test_experts_that_are_not_packed_cannot_be_held_packed(published):
    root, _, _ = published
    with pytest.raises(PipelineError, match="hold no MXFP4 experts.*set target.weights=bf16"):
        checkpoints.load_target(root / "floats", PACKED)


def test_a_scale_that_is_no_number_is_named(published, tmp_path):
    root, _, _ = published
    for file in (root / "packed").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.layers.1.mlp.experts.down_proj_scales"
    tensors = load_file(tmp_path / index[name])
    tensors[name][0, 3, 0] = 255
    save_file(tensors, tmp_path / index[name])
    with pytest.raises(PipelineError, match=rf"1 tensor\(s\) wrong\n  {name}: not finite"):
        checkpoints.load_target(tmp_path, PACKED)
