"""MXFP4 checkpoints in OpenAI's layout, written by NVIDIA's Model Optimizer, against transformers' own reading."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pipeline.errors import PipelineError
from pipeline.model.gpt_oss import forward as gpt_oss
from pipeline.model.gpt_oss.weights import WeightFormat
from pipeline.model.hf.directory import read_target
from pipeline.model.parallel.execution import DEFAULT_EXECUTION, Execution, KernelBackend
from tests.support import models as tiny_models
from tests.support.oracles import run_oracle

TOLERANCE = 1e-4
CASES = {"experts wide": tiny_models.PACKED_TARGET, "experts apart": tiny_models.WIDE_PACKED_TARGET}
step = jax.jit(gpt_oss.forward, static_argnames=("tapped_layers", "execution"))
PACKED, EXPANDED = WeightFormat(packed=True), WeightFormat()


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


def outputs_of(directory, ids, weight_format, execution=DEFAULT_EXECUTION):
    target = read_target(directory, weight_format)
    taps = tuple(range(target.config.num_hidden_layers))
    out = step(target, ids, jnp.zeros(len(ids), jnp.int32), None, taps, execution=execution)
    return gpt_oss.logits(target.weights, out.hidden), out.features


@pytest.mark.parametrize("weight_format", [PACKED, EXPANDED], ids=["packed", "expanded"])
@pytest.mark.parametrize("max_per_expert_tokens", [0, 999], ids=["grouped", "few"])
def test_logits_and_features_equal_those_of_the_dequantised_model(published, weight_format, max_per_expert_tokens):
    root, ids, expected = published
    logits, features = outputs_of(
        root / "packed", ids, weight_format, Execution(max_per_expert_tokens=max_per_expert_tokens)
    )
    assert expected["logits"].std() > 1
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=TOLERANCE)
    wanted = np.moveaxis(expected["features"], 0, -2).reshape(features.shape)
    np.testing.assert_allclose(features, wanted, rtol=0, atol=TOLERANCE)


def test_packed_and_expanded_in_bfloat16_agree_within_its_rounding(published):
    """The values are the same; only sums are taken in another order, and rounded where bfloat16 rounds."""
    root, ids, expected = published
    floats = [outputs_of(root / "packed", ids, WeightFormat("bfloat16", packed))[0] for packed in (True, False)]
    errors = [np.sqrt(np.square(logits - expected["logits"]).mean()) for logits in floats]
    apart = np.sqrt(np.square(floats[0] - floats[1]).mean())
    assert apart <= max(errors)  # no further from each other than from the exact logits
    assert max(errors) <= 0.05 * expected["logits"].std()


def test_the_tpu_kernels_give_the_packed_logits(published):
    root, ids, expected = published
    execution = Execution(backend=KernelBackend.pallas_interpreted, max_per_expert_tokens=999)
    logits, _ = outputs_of(root / "packed", ids[:1, :5], WeightFormat("bfloat16", packed=True), execution)
    plain, _ = outputs_of(root / "packed", ids[:1, :5], WeightFormat("bfloat16", packed=True))
    np.testing.assert_allclose(logits, plain, rtol=0, atol=0.1 * expected["logits"].std())


def test_packed_experts_take_about_half_a_byte_a_parameter(published):
    root, _, _ = published
    target = read_target(root / "packed", PACKED)
    config, experts = target.config, target.weights.layers[0].experts
    held = sum(leaf.nbytes for matrix in (experts.gate, experts.up, experts.down) for leaf in jax.tree.leaves(matrix))
    parameters = 3 * config.num_local_experts * PACKED.packed_rows(config.intermediate_size) * config.hidden_size
    assert held / parameters == 0.5 + 1 / 32


def test_experts_that_are_not_packed_cannot_be_held_packed(published):
    root, _, _ = published
    with pytest.raises(PipelineError, match="hold no MXFP4 experts.*set target.weights=bf16"):
        read_target(root / "floats", PACKED)


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
        read_target(tmp_path, PACKED)
