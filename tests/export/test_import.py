"""Drafts read back: our own to the last bit, published ones in every spelling they have, broken ones not at all."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pipeline.errors import PipelineError
from pipeline.export.write import write_draft
from pipeline.model.hf import dflash as hf_dflash
from pipeline.model.hf.directory import read_draft
from pipeline.model.layers.rope import Rope
from tests.support import training as tiny_training

pytestmark = pytest.mark.usefixtures("compiled_quickly")

TOKEN_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
PLAIN = dataclasses.replace(tiny_training.DRAFT, block_size=8)
YARN = Rope(theta=150000.0, factor=8.0, truncate=False, original_max_position_embeddings=32)
DRAFTS = {
    "plain, 8 slots": PLAIN,
    "biases, 10 slots": dataclasses.replace(PLAIN, attention_bias=True, block_size=10),
    "YaRN, 16 slots": dataclasses.replace(PLAIN, rope=YARN, block_size=16),
    "biases and YaRN": dataclasses.replace(PLAIN, rope=YARN, attention_bias=True, max_position_embeddings=256),
}
PUBLISHED_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 4096,
}
PUBLISHED = {  # z-lab/gpt-oss-20b-DFlash as docs/dflash.md#published-drafts has it
    "architectures": ["DFlashDraftModel"],
    "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
    "model_type": "qwen3",
    "torch_dtype": "bfloat16",
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 7680,
    "num_hidden_layers": 8,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "hidden_act": "silu",
    "attention_bias": True,
    "attention_dropout": 0.0,
    "rms_norm_eps": 1e-5,
    "layer_types": ["full_attention"] * 8,
    "max_window_layers": 8,
    "use_sliding_window": False,
    "sliding_window": None,
    "initial_context_length": 4096,
    "max_position_embeddings": 131072,
    "rope_theta": 150000,
    "rope_scaling": PUBLISHED_YARN,
    "num_target_layers": 24,
    "block_size": 8,
    "tie_word_embeddings": False,
    "bos_token_id": 199998,
    "eos_token_id": 200002,
    "dflash_config": {"mask_token_id": 200000, "target_layer_ids": [1, 6, 11, 16, 21]},
}
TOP_LEVEL = {
    key: value for key, value in (PUBLISHED | PUBLISHED["dflash_config"]).items() if key not in ("dflash_config",)
}
SPELLINGS = {
    "20b": PUBLISHED,
    "120b": PUBLISHED
    | {
        "num_target_layers": 36,
        "block_size": 10,
        "dflash_config": {"mask_token_id": 200000, "target_layer_ids": [1, 9, 17, 25, 33]},
    },
    "ids and mask at top level": TOP_LEVEL,
    "saved by transformers 5": {key: value for key, value in PUBLISHED.items() if not key.startswith("rope")}
    | {"rope_parameters": PUBLISHED_YARN | {"rope_theta": 150000.0}},
    "rope type by its older name": PUBLISHED
    | {"rope_scaling": {"type" if key == "rope_type" else key: value for key, value in PUBLISHED_YARN.items()}},
    "block size in dflash_config": {key: value for key, value in PUBLISHED.items() if key != "block_size"}
    | {"dflash_config": PUBLISHED["dflash_config"] | {"block_size": 8}},
}


@pytest.mark.parametrize("config", DRAFTS.values(), ids=DRAFTS.keys())
def test_an_exported_draft_read_back_is_the_trained_one_and_exports_to_the_same_bytes(tmp_path, config):
    trained = tiny_training.draft_of(0, config)
    first, second = tmp_path / "first", tmp_path / "second"
    for directory in (first, second):
        directory.mkdir()
    write_draft(first, trained, TOKEN_IDS)
    read = read_draft(first, jnp.float32)
    assert read.config == config
    for ours, theirs in zip(jax.tree.leaves(trained), jax.tree.leaves(read), strict=True):
        np.testing.assert_array_equal(ours.astype(jnp.bfloat16).astype(jnp.float32), theirs)
    write_draft(second, read, TOKEN_IDS)
    for name in ("config.json", "model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.parametrize("published", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_published_configs_are_read_in_every_spelling(published):
    found = hf_dflash.config_from_hf(published)
    large = published.get("num_target_layers") == 36
    assert found.rope == Rope(theta=150000.0, factor=32.0, original_max_position_embeddings=4096)
    assert found.attention_bias
    assert found.block_size == (10 if large else 8)
    assert found.mask_token_id == 200000
    assert found.tapped_layers == ((1, 9, 17, 25, 33) if large else (1, 6, 11, 16, 21))
    assert (found.hidden_size, found.intermediate_size, found.num_hidden_layers) == (2880, 7680, 8)


def test_a_published_draft_in_several_files_is_read_and_exported_in_one(tmp_path):
    config = DRAFTS["biases and YaRN"]
    source, exported = tmp_path / "source", tmp_path / "exported"
    for directory in (source, exported):
        directory.mkdir()
    write_draft(source, tiny_training.draft_of(3, config), TOKEN_IDS)
    tensors = load_file(source / "model.safetensors")
    whole = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").unlink()
    weight_map = {}
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        file = f"model-0000{number + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, source / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    write_draft(exported, read_draft(source, jnp.float32), TOKEN_IDS)
    assert (exported / "model.safetensors").read_bytes() == whole


def test_wrong_tensors_of_a_draft_are_all_named_in_one_error(tmp_path):
    write_draft(tmp_path, tiny_training.draft_of(0), TOKEN_IDS)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["layers.0.self_attn.qkv_proj.weight"] = tensors.pop("layers.0.self_attn.k_proj.weight")
    tensors["fc.bias"] = np.zeros(20, np.float32)
    tensors["norm.weight"] = np.ones(21, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(PipelineError) as caught:
        read_draft(tmp_path, jnp.float32)
    for part in (
        "4 tensor(s) wrong",
        "layers.0.self_attn.qkv_proj.weight: unexpected",
        "fc.bias: unexpected",
        "layers.0.self_attn.k_proj.weight: missing",
        "norm.weight: shape [21], wanted [20]",
    ):
        assert part in str(caught.value)


def test_names_with_a_prefix_are_refused_with_the_reason(tmp_path):
    write_draft(tmp_path, tiny_training.draft_of(0), TOKEN_IDS)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({f"model.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(PipelineError, match="begins with 'model.'"):
        read_draft(tmp_path, jnp.float32)


INNER = PUBLISHED["dflash_config"]
REFUSED = {
    "another class": ({"architectures": ["DFlash2DraftModel"]}, "architectures: found"),
    "a window": ({"layer_types": ["sliding_attention"] * 8}, "layer_types: found ['sliding_attention']"),
    "windows by a switch": ({"layer_types": None, "use_sliding_window": True}, "layer_types: found sliding windows"),
    "causal layers": ({"is_causal": True}, "is_causal: found True"),
    "causal layers, as vLLM has it": ({"dflash_config": INNER | {"causal": True}}, "causal: found True"),
    "windows, as vLLM has it": ({"dflash_config": INNER | {"use_swa": True}}, "use_swa: found True"),
    "a softcap": ({"dflash_config": INNER | {"final_logit_softcapping": 30.0}}, "final_logit_softcapping: found 30.0"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act: found gelu"),
    "a vocabulary of its own": ({"draft_vocab_size": 32000}, "draft_vocab_size: found 32000"),
    "two block sizes": ({"dflash_config": INNER | {"block_size": 16}}, "block_size: 16 in dflash_config, 8 at top"),
    "two lists of layers": ({"target_layer_ids": [1, 6, 11, 16, 20]}, "target_layer_ids: [1, 6, 11, 16, 21] in"),
    "layers out of order": (
        {"dflash_config": INNER | {"target_layer_ids": [6, 1, 11, 16, 21]}},
        "wanted ascending layers of 0..22",
    ),
    "the last layer": ({"dflash_config": INNER | {"target_layer_ids": [1, 23]}}, "wanted ascending layers of 0..22"),
    "a mask beyond the vocabulary": (
        {"dflash_config": INNER | {"mask_token_id": 201088}},
        "mask_token_id: found 201088",
    ),
    "a mask by its text": ({"dflash_config": INNER | {"mask_token_id": "<mask>"}}, "mask_token_id: found '<mask>'"),
    "no layer count of the target": ({"num_target_layers": None}, "num_target_layers: missing"),
    "no theta": ({"rope_theta": None}, "config.json has no rope_theta"),
    "two ropes": ({"rope_parameters": {"rope_type": "default", "rope_theta": 150000}}, "they must agree"),
    "YaRN without its factor": ({"rope_scaling": {"rope_type": "yarn"}}, "lacks factor and original_max"),
}


@pytest.mark.parametrize(("change", "fault"), REFUSED.values(), ids=REFUSED.keys())
def test_a_config_of_another_network_or_of_two_minds_is_refused(change, fault):
    with pytest.raises(PipelineError) as caught:
        hf_dflash.config_from_hf(PUBLISHED | change)
    assert fault in str(caught.value)


def test_all_faults_of_a_config_are_named_at_once():
    faults = {"head_dim": None, "is_causal": True, "hidden_act": "gelu", "rope_theta": None}
    with pytest.raises(PipelineError) as caught:
        hf_dflash.config_from_hf(PUBLISHED | faults)
    for name in faults:
        assert name in str(caught.value)
