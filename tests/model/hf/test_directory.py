"""Reading and writing HF directories: nothing is guessed, nothing is left out in silence."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from omegaconf import OmegaConf
from safetensors.numpy import load_file, save_file

from pipeline.config.schema import ArchitectureConfig
from pipeline.errors import PipelineError
from pipeline.model.dflash import weights as dflash_weights
from pipeline.model.dflash.config import DFlashConfig
from pipeline.model.dflash.model import DraftModel
from pipeline.model.gpt_oss import weights as gpt_oss_weights
from pipeline.model.gpt_oss.config import GptOssConfig
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.gpt_oss.weights import WeightFormat
from pipeline.model.hf import dflash as hf_dflash
from pipeline.model.hf import gpt_oss as hf_gpt_oss
from pipeline.model.hf.directory import read_draft, read_target, save_draft, save_target, weight_paths
from pipeline.model.layers.rope import Rope
from pipeline.workspace import specs
from tests.support import models as tiny_models
from tests.support.paths import ROOT

CONF = ROOT / "conf"
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def draft_config(**changes) -> DFlashConfig:
    values = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 56,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "rope": Rope(theta=1e6),
        "tapped_layers": (0, 2),
        "num_target_layers": 4,
        "block_size": 5,
        "mask_token_id": 96,
    }
    return DFlashConfig(**{**values, **changes})


@pytest.fixture
def target(tmp_path):
    config = GptOssConfig.from_hf(tiny_models.TARGET)
    weights = gpt_oss_weights.random_weights(config, jax.random.key(0))
    save_target(tmp_path, TargetModel(config, weights), TOKENS)
    return tmp_path, config, weights


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("hf", [tiny_models.TARGET, tiny_models.WIDE_TARGET], ids=["experts wide", "experts apart"])
def test_a_target_read_back_is_the_target_written(tmp_path, hf, dtype):
    config, weight_format = GptOssConfig.from_hf(hf), WeightFormat(dtype)
    weights = gpt_oss_weights.random_weights(config, jax.random.key(0), weight_format)
    save_target(tmp_path, TargetModel(config, weights), TOKENS)
    again = read_target(tmp_path, weight_format)
    assert again.config == config
    for (path, ours), (_, theirs) in zip(weight_paths(weights), weight_paths(again.weights), strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours == theirs).all(), path


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_a_draft_read_back_is_the_draft_written(tmp_path, bias):
    config = draft_config(attention_bias=bias, rope=Rope(theta=150000.0, factor=32.0) if bias else Rope(theta=1e6))
    weights = dflash_weights.random_weights(config, jax.random.key(0), jnp.bfloat16)
    save_draft(tmp_path, DraftModel(config, weights), TOKENS)
    again = read_draft(tmp_path, jnp.bfloat16)
    assert again.config == config
    assert all(bool((a == b).all()) for a, b in zip(jax.tree.leaves(weights), jax.tree.leaves(again), strict=True))


def test_shards_are_read_through_their_index(target):
    directory, _, weights = target
    tensors = load_file(directory / "model.safetensors")
    names = sorted(tensors)
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    loaded = read_target(directory, WeightFormat())
    assert all(bool((a == b).all()) for a, b in zip(jax.tree.leaves(weights), jax.tree.leaves(loaded), strict=True))
    (directory / "model-1.safetensors").unlink()
    with pytest.raises(PipelineError, match=r"lacks model-1\.safetensors"):
        read_target(directory, WeightFormat())


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([], "holds a list, wanted an object"),
        ({}, "has no weight_map from tensors to files beside it"),
        ({"weight_map": {}}, "has no weight_map from tensors to files beside it"),
        ({"weight_map": {"a": 5}}, "has no weight_map from tensors to files beside it"),
        ({"weight_map": {"a": "../model.safetensors"}}, "has no weight_map from tensors to files beside it"),
        ({"weight_map": {"a": ""}}, "has no weight_map from tensors to files beside it"),
    ],
)
def test_an_index_that_names_no_files_is_refused(target, content, problem):
    directory, _, _ = target
    (directory / "model.safetensors").rename(directory / "model-00001-of-00001.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(PipelineError, match=f"index.json {problem}"):
        read_target(directory, WeightFormat())


def test_all_wrong_tensors_are_named_at_once(target):
    directory, _, _ = target
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.self_attn.sinks"]
    tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(4, np.float32)
    tensors["model.norm.weight"] = np.ones(5, np.float32)
    tensors["lm_head.weight"][3, 4] = np.nan
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(PipelineError) as error:
        read_target(directory, WeightFormat())
    for part in (
        "4 tensor(s) wrong",
        "model.layers.1.self_attn.sinks: missing",
        "model.layers.0.self_attn.q_norm.weight: unexpected",
        "model.norm.weight: shape [5], wanted [48]",
        "lm_head.weight: not finite",
    ):
        assert part in str(error.value)


def test_a_truncated_file_is_named(target):
    directory, _, _ = target
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(PipelineError, match="damaged safetensors file"):
        read_target(directory, WeightFormat())


def test_the_exported_config_has_both_spellings_of_rope_and_every_key_a_runtime_reads():
    written = hf_dflash.config_to_hf(draft_config(), "bfloat16", TOKENS)
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 1e6
    assert written["rope_scaling"] is None
    assert written["num_target_layers"] == 4
    assert written["target_hidden_size"] == 48
    assert written["block_size"] == written["dflash_config"]["block_size"] == 5
    assert written["dflash_config"]["target_layer_ids"] == [0, 2]
    assert written["dflash_config"]["mask_token_id"] == 96


@pytest.mark.parametrize("hf", [tiny_models.TARGET, tiny_models.PLAIN_ROPE_TARGET], ids=["YaRN", "plain"])
def test_a_written_targets_config_has_both_spellings_of_rope(hf):
    written, rope = GptOssConfig.from_hf(hf).to_hf(), hf["rope_parameters"]
    legacy = {key: value for key, value in rope.items() if key != "rope_theta"}
    assert written["rope_parameters"] == rope
    assert written["rope_theta"] == rope["rope_theta"]
    assert written["rope_scaling"] == (None if hf is tiny_models.PLAIN_ROPE_TARGET else legacy)


def test_a_config_without_a_mask_token_is_refused_not_defaulted():
    written = hf_dflash.config_to_hf(draft_config(), "bfloat16", TOKENS)
    del written["dflash_config"]["mask_token_id"]
    with pytest.raises(PipelineError, match="mask_token_id: missing"):
        hf_dflash.config_from_hf(written)


@pytest.mark.parametrize(("name", "billions"), [("gpt_oss_20b", 20.91), ("gpt_oss_120b", 116.83)])
def test_the_published_models_have_as_many_parameters_as_their_card_says(name, billions):
    # gpt-oss model card, table 1
    sizes = OmegaConf.load(CONF / "target" / f"{name}.yaml").target.architecture
    model = specs.architecture(ArchitectureConfig(**sizes))
    assert round(hf_gpt_oss.num_parameters(model) / 1e9, 2) == billions
