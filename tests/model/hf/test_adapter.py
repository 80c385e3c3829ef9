"""A model read with a PEFT adapter computes what PEFT computes with it, and a foreign adapter is refused by name."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pipeline.errors import PipelineError
from pipeline.model.gpt_oss import forward as gpt_oss
from pipeline.model.gpt_oss.weights import WeightFormat
from pipeline.model.hf.directory import open_target, read_embedding_and_head, read_target, weights_fingerprint
from tests.support import models as tiny_models
from tests.support.oracles import run_oracle

TOLERANCE = 1e-4
MODEL = {**tiny_models.PACKED_TARGET, "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
ATTENTION = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
SETTINGS = {
    "attention": ATTENTION,
    "attention and experts": {
        **ATTENTION,
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.router.weight"],
    },
    "gate and up of one layer, ranks and alphas by module": {
        "r": 4,
        "lora_alpha": 5,
        "use_rslora": True,
        "target_modules": ["q_proj", "embed_tokens", "lm_head"],
        "target_parameters": ["1.mlp.experts.gate_up_proj"],
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"q_proj": 3, "embed_tokens": 2},
    },
    "biases and a norm of its own": {**ATTENTION, "bias": "lora_only", "modules_to_save": ["post_attention_layernorm"]},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """One model as floats and as MXFP4, and the inputs of a batch."""
    root = tmp_path_factory.mktemp("models")
    (root / "wanted.json").write_text(json.dumps(MODEL))
    run_oracle("make_gpt_oss", config=root / "wanted.json", seed=5, out=root / "floats")
    run_oracle("pack_mxfp4", model=root / "floats", out=root / "packed", shards=2)
    np.savez(root / "in.npz", input_ids=np.random.default_rng(0).integers(0, MODEL["vocab_size"], (2, 19)))
    return root


def adapted(models: Path, name: str, settings: dict, tmp_path: Path) -> np.ndarray:
    """Writes an adapter to `tmp_path / "adapter"`; PEFT's logits with it."""
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    files = {"inputs": models / "in.npz", "outputs": tmp_path / "out.npz", "out": tmp_path / "adapter"}
    run_oracle("adapt_gpt_oss", model=models / name, settings=tmp_path / "settings.json", seed=2, **files)
    return np.load(tmp_path / "out.npz")["logits"]


def logits_of(models: Path, name: str, adapter: Path | None, weight_format: WeightFormat) -> np.ndarray:
    ids = np.load(models / "in.npz")["input_ids"].astype(np.int32)
    target = read_target(open_target(models / name, adapter), weight_format)
    hidden = jax.jit(gpt_oss.forward)(target, ids, jnp.zeros(len(ids), jnp.int32), None).hidden
    return np.asarray(gpt_oss.logits(target.weights, hidden))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_merged_adapter_gives_pefts_logits(models, tmp_path, settings):
    wanted = adapted(models, "floats", settings, tmp_path)
    found = logits_of(models, "floats", tmp_path / "adapter", WeightFormat())
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)
    assert np.abs(logits_of(models, "floats", None, WeightFormat()) - wanted).max() > 100 * TOLERANCE


def test_packed_experts_stay_packed_beside_adapted_attention(models, tmp_path):
    wanted = adapted(models, "packed", ATTENTION, tmp_path)
    found = logits_of(models, "packed", tmp_path / "adapter", WeightFormat(packed=True))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)


def test_packed_experts_that_are_adapted_are_unpacked(models, tmp_path):
    wanted = adapted(models, "packed", SETTINGS["attention and experts"], tmp_path)
    opened = open_target(models / "packed", tmp_path / "adapter")
    assert not opened.is_packed
    found = logits_of(models, "packed", tmp_path / "adapter", WeightFormat())
    assert np.sqrt(np.square(found - wanted).mean()) < 0.02 * wanted.std()  # the sums are rounded to bfloat16
    with pytest.raises(PipelineError, match="hold no MXFP4 experts"):
        read_target(opened, WeightFormat(packed=True))


def test_any_part_of_a_merged_tensor_is_the_part_of_the_tensor(models, tmp_path):
    adapted(models, "packed", SETTINGS["attention and experts"], tmp_path)
    files, random = open_target(models / "packed", tmp_path / "adapter").files, np.random.default_rng(0)
    for name in files.names:
        whole = files.read(name)
        edges = [sorted(random.choice(size + 1, 2, replace=False)) for size in whole.shape]
        index = tuple(slice(int(start), int(stop)) for start, stop in edges)
        np.testing.assert_array_equal(files.read(name, index), whole[index], err_msg=name)


@pytest.fixture
def adapter(models, tmp_path):
    """An adapter of attention and experts that a test may change."""
    adapted(models, "floats", SETTINGS["attention and experts"], tmp_path)
    return tmp_path / "adapter"


def test_an_adapter_counts_by_its_content_in_the_weights(models, adapter, tmp_path):
    before = weights_fingerprint(models / "floats", adapter=adapter)
    assert before != weights_fingerprint(models / "floats")
    assert before == weights_fingerprint(models / "floats", adapter=Path(shutil.copytree(adapter, tmp_path / "copy")))
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 7}))
    assert before != weights_fingerprint(models / "floats", adapter=adapter)


def test_embedding_and_head_are_those_of_the_adapted_model(models, tmp_path):
    settings = SETTINGS["gate and up of one layer, ranks and alphas by module"]
    adapted(models, "floats", settings, tmp_path)
    embedding, head = read_embedding_and_head(models / "floats", jnp.float32, tmp_path / "adapter")
    weights = read_target(open_target(models / "floats", tmp_path / "adapter"), WeightFormat()).weights
    assert (embedding == weights.embedding).all()
    assert (np.asarray(head) == np.asarray(weights.head)).all()


FOREIGN = {
    "another kind": ({"peft_type": "IA3"}, "peft_type: found 'IA3', wanted 'LORA'"),
    "DoRA": ({"use_dora": True}, "use_dora: found True"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights: found 'pissa', which changes"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha: found None, wanted a number"),
}


@pytest.mark.parametrize(("change", "problem"), FOREIGN.values(), ids=FOREIGN.keys())
def test_an_adapter_that_is_no_plain_lora_is_refused(models, adapter, change, problem):
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | change))
    with pytest.raises(PipelineError, match=f"is no adapter that can be merged:\n.*{problem}"):
        open_target(models / "floats", adapter)


def test_everything_in_an_adapter_that_does_not_fit_is_named(models, adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    stem = "base_model.model.model.layers."
    tensors[f"{stem}7.self_attn.q_proj.lora_A.weight"] = np.ones((3, 128), np.float32)
    tensors[f"{stem}7.self_attn.q_proj.lora_B.weight"] = np.ones((96, 3), np.float32)
    tensors[f"{stem}0.self_attn.q_proj.lora_magnitude_vector"] = np.ones(96, np.float32)
    del tensors[f"{stem}1.self_attn.k_proj.lora_B.weight"]
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(PipelineError) as error:
        open_target(models / "floats", adapter)
    for part in (
        "layers.7.self_attn.q_proj: a change of [96, 128]",
        "layers.0.self_attn.q_proj.lora_magnitude_vector: no tensor of the model",
        "layers.1.self_attn.k_proj: found A of a pair, wanted lora_A and lora_B",
    ):
        assert part in str(error.value)
    with pytest.raises(PipelineError, match="no adapter_config.json in .*; give the directory of a PEFT adapter"):
        open_target(models / "floats", models)
