"""Checkpoints as trainers and tools leave them hold the model that transformers wrote, or are refused by name."""

import json
import logging

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pipeline.errors import PipelineError
from pipeline.model.gpt_oss import weights as gpt_oss_weights
from pipeline.model.gpt_oss.config import GptOssConfig
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.gpt_oss.weights import WeightFormat
from pipeline.model.hf.directory import (
    open_target,
    read_config,
    read_draft_config,
    read_target,
    read_target_config,
    save_target,
    weight_paths,
)
from tests.support import models as tiny_models

TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
EXPERTS = "mlp.experts."
FLOATS = WeightFormat()


@pytest.fixture
def target(tmp_path):
    """A target of ours, its config.json and its tensors."""
    config = GptOssConfig.from_hf(tiny_models.TARGET)
    save_target(tmp_path, TargetModel(config, gpt_oss_weights.random_weights(config, jax.random.key(0))), TOKENS)
    return tmp_path, read_config(tmp_path), load_file(tmp_path / "model.safetensors")


def rewritten(directory, config, tensors):
    (directory / "config.json").write_text(json.dumps(config))
    whole = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(whole, directory / "model.safetensors")
    return directory


def assert_equal(directory, wanted, weight_format=FLOATS):
    found = read_target(directory, weight_format)
    for (path, ours), (_, theirs) in zip(weight_paths(found.weights), weight_paths(wanted.weights), strict=True):
        assert (np.asarray(ours) == np.asarray(theirs)).all(), path


def one_by_one(tensors, split):
    """Experts as linear layers of their own, [out, in]; `split` takes a matrix's name and one expert's rows."""
    found = {}
    for name, tensor in tensors.items():
        layer, _, field = name.partition(EXPERTS)
        if not field:
            found[name] = tensor
            continue
        what = "bias" if field.endswith("_bias") else "weight"
        rows = tensor if what == "bias" else np.swapaxes(tensor, 1, 2)
        for number, expert in enumerate(rows):
            for part, array in split(field.removesuffix("_bias"), number, expert).items():
                found[f"{layer}{EXPERTS}{part}.{what}"] = array
    return found


def by_unsloth(stem, number, expert):
    return {f"{stem}s.{number}": expert}


def by_part(stem, number, expert):
    if stem == "down_proj":
        return {f"{number}.down_proj": expert}
    return {f"{number}.gate_proj": expert[0::2], f"{number}.up_proj": expert[1::2]}


LAYOUTS = {
    "Unsloth's": lambda tensors: {
        name.replace("mlp.router.", "mlp.router.linear."): tensor
        for name, tensor in one_by_one(tensors, by_unsloth).items()
    },
    "gate, up and down of each": lambda tensors: one_by_one(tensors, by_part),
    "PEFT's and torch.compile's prefixes, a buffer": lambda tensors: {
        **{f"base_model.model._orig_mod.{name}": tensor for name, tensor in tensors.items()},
        "base_model.model._orig_mod.model.rotary_emb.inv_freq": np.ones(8, np.float32),
    },
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_checkpoint_in_another_layout_is_the_same_target(target, caplog, layout):
    directory, config, tensors = target
    wanted = read_target(directory, WeightFormat())
    rewritten(directory, config, layout(tensors))
    with caplog.at_level(logging.INFO, logger="pipeline"):
        assert_equal(directory, wanted)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_any_part_of_a_tensor_in_another_layout_is_the_part_of_the_tensor(target, layout):
    directory, config, tensors = target
    rewritten(directory, config, layout(tensors))
    opened, random = open_target(directory), np.random.default_rng(0)
    for name, tensor in tensors.items():
        for _ in range(4):
            edges = [sorted(random.choice(size + 1, 2, replace=False)) for size in tensor.shape]
            index = tuple(slice(int(start), int(stop)) for start, stop in edges)
            np.testing.assert_array_equal(opened.files.read(name, index), tensor[index], err_msg=name)


def test_experts_that_are_not_all_there_are_named(target):
    directory, config, tensors = target
    split = one_by_one(tensors, by_part)
    del split["model.layers.1.mlp.experts.3.up_proj.weight"]
    rewritten(directory, config, split)
    with pytest.raises(PipelineError, match=r"not all there.*\n.*layers\.1\.mlp\.experts\.\*\.gate\.weight: of 5"):
        read_target(directory, WeightFormat())


def original(config, tensors):
    """OpenAI's own layout, as gpt-oss's torch model has it."""
    rope = config["rope_scaling"]
    same = (
        "num_hidden_layers vocab_size hidden_size intermediate_size swiglu_limit head_dim num_attention_heads "
        "num_key_value_heads sliding_window rope_theta"
    )
    kept = {key: config[key] for key in same.split()} | {
        "num_experts": config["num_local_experts"],
        "experts_per_token": config["num_experts_per_tok"],
        "initial_context_length": rope["original_max_position_embeddings"],
        "rope_scaling_factor": rope["factor"],
        "rope_ntk_alpha": 1.0,
        "rope_ntk_beta": 32.0,
    }
    found = {
        "embedding.weight": tensors["model.embed_tokens.weight"],
        "unembedding.weight": tensors["lm_head.weight"],
        "norm.scale": tensors["model.norm.weight"],
    }
    renamed = {
        "input_layernorm.weight": "attn.norm.scale",
        "self_attn.o_proj.weight": "attn.out.weight",
        "self_attn.o_proj.bias": "attn.out.bias",
        "self_attn.sinks": "attn.sinks",
        "post_attention_layernorm.weight": "mlp.norm.scale",
        "mlp.router.weight": "mlp.gate.weight",
        "mlp.router.bias": "mlp.gate.bias",
        "mlp.experts.gate_up_proj_bias": "mlp.mlp1_bias",
        "mlp.experts.down_proj_bias": "mlp.mlp2_bias",
        "mlp.experts.gate_up_proj_blocks": "mlp.mlp1_weight.blocks",
        "mlp.experts.gate_up_proj_scales": "mlp.mlp1_weight.scales",
        "mlp.experts.down_proj_blocks": "mlp.mlp2_weight.blocks",
        "mlp.experts.down_proj_scales": "mlp.mlp2_weight.scales",
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for theirs, ours in renamed.items():
            found[f"block.{layer}.{ours}"] = tensors[prefix + theirs]
        for what in ("weight", "bias"):
            parts = [tensors[f"{prefix}self_attn.{part}_proj.{what}"] for part in "qkv"]
            found[f"block.{layer}.attn.qkv.{what}"] = np.concatenate(parts)
    return kept, found


def packed(config, tensors, random):
    """Experts as random MXFP4."""
    experts, d, f = config["num_local_experts"], config["hidden_size"], config["intermediate_size"]
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith(("gate_up_proj", "down_proj"))}
    for layer in range(config["num_hidden_layers"]):
        for stem, width, summed in (("gate_up_proj", 2 * f, d), ("down_proj", d, f)):
            name, groups = f"model.layers.{layer}.{EXPERTS}{stem}", summed // 32
            found[f"{name}_blocks"] = random.integers(0, 256, (experts, width, groups, 16), np.uint8)
            found[f"{name}_scales"] = random.integers(120, 124, (experts, width, groups), np.uint8)
    return found


@pytest.fixture
def mxfp4(tmp_path):
    """A packed target."""
    hf = GptOssConfig.from_hf({**tiny_models.PACKED_TARGET, "num_hidden_layers": 2, "layer_types": None})
    save_target(tmp_path, TargetModel(hf, gpt_oss_weights.random_weights(hf, jax.random.key(0))), TOKENS)
    config = {**read_config(tmp_path), "quantization_config": {"quant_method": "mxfp4"}}
    tensors = packed(config, load_file(tmp_path / "model.safetensors"), np.random.default_rng(0))
    return rewritten(tmp_path, config, tensors), config, tensors


@pytest.mark.parametrize("is_packed", [True, False])
def test_openais_own_layout_is_the_same_target(mxfp4, is_packed):
    directory, config, tensors = mxfp4
    weight_format = WeightFormat(packed=is_packed)
    wanted = read_target(directory, weight_format)
    rewritten(directory, *original(config, tensors))
    assert read_target_config(directory) == wanted.config
    assert_equal(directory, wanted, weight_format)


LEFT_OVER = {
    "dequantize": {"quant_method": "mxfp4", "dequantize": True},
    "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
}


@pytest.mark.parametrize("left_over", LEFT_OVER.values(), ids=LEFT_OVER.keys())
def test_floats_with_a_left_over_quantization_config_are_read_as_floats(target, caplog, left_over):
    directory, config, tensors = target
    wanted = read_target(directory, WeightFormat("bfloat16"))
    halves = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    rewritten(directory, {**config, "quantization_config": left_over}, halves)
    with caplog.at_level(logging.INFO, logger="pipeline"):
        assert_equal(directory, wanted, WeightFormat("bfloat16"))
    assert [record.message for record in caplog.records] == [
        f"{directory}: the experts are read as the floats that they are, though config.json says mxfp4"
    ]


def test_an_empty_quantization_config_says_nothing(target):
    directory, config, tensors = target
    wanted = read_target(directory, WeightFormat())
    assert_equal(rewritten(directory, {**config, "quantization_config": {}}, tensors), wanted)


def test_packed_experts_are_read_whatever_the_config_says(mxfp4):
    directory, config, tensors = mxfp4
    wanted = read_target(directory, WeightFormat(packed=True))
    without = {key: value for key, value in config.items() if key != "quantization_config"}
    assert_equal(rewritten(directory, without, tensors), wanted, WeightFormat(packed=True))


def test_a_tied_head_is_the_embedding(target):
    directory, config, tensors = target
    tied = {**config, "tie_word_embeddings": True}
    with pytest.raises(PipelineError, match=r"tie_word_embeddings: found true, and lm_head\.weight differs"):
        read_target(rewritten(directory, tied, tensors), WeightFormat())
    both = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    wanted = read_target(rewritten(directory, config, both), WeightFormat())
    assert_equal(rewritten(directory, tied, both), wanted)
    del both["lm_head.weight"]
    assert_equal(rewritten(directory, tied, both), wanted)


def test_one_file_beside_an_index_of_others_is_ambiguous(target):
    directory, _, tensors = target
    save_file(tensors, directory / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(PipelineError) as error:
        read_target(directory, WeightFormat())
    for part in ("model.safetensors,", "model.safetensors.index.json", "model-00001-of-00001.safetensors"):
        assert part in str(error.value)


QUANTISED = {
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
    "bitsandbytes without a name": ({"load_in_4bit": True}, "bitsandbytes"),
    "AWQ": ({"quant_method": "awq", "bits": 4}, "AWQ"),
    "GPTQ": ({"quant_method": "gptq"}, "GPTQ"),
    "FP8": ({"quant_method": "fp8"}, "FP8"),
    "NVFP4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "NVFP4"),
    "Quark": ({"quant_method": "quark"}, "AMD Quark"),
    "text": ("mxfp4", "wanted quant_method mxfp4 or none"),
}


@pytest.mark.parametrize(("quantization", "named"), QUANTISED.values(), ids=QUANTISED.keys())
def test_another_quantisation_is_refused_by_name(target, quantization, named):
    directory, config, tensors = target
    rewritten(directory, {**config, "quantization_config": quantization}, tensors)
    with pytest.raises(PipelineError, match=f"quantization_config: found .*{named}"):
        read_target(directory, WeightFormat())


TENSORS = {
    "bitsandbytes": ({"self_attn.q_proj.weight.absmax": np.uint8}, "bitsandbytes"),
    "AWQ": ({"self_attn.q_proj.qweight": np.int32}, "AWQ"),
    "GPTQ": ({"self_attn.q_proj.qweight": np.int32, "self_attn.q_proj.g_idx": np.int32}, "GPTQ"),
    "NVFP4": ({f"{EXPERTS}gate_up_proj_{name}": np.float32 for name in ("weight_scale", "weight_scale_2")}, "NVFP4"),
    "FP8": ({"self_attn.q_proj.weight": ml_dtypes.float8_e4m3fn}, "FP8"),
}


@pytest.mark.parametrize(("added", "named"), TENSORS.values(), ids=TENSORS.keys())
def test_another_quantisation_is_told_by_its_tensors(target, added, named):
    directory, config, tensors = target
    more = {f"model.layers.0.{name}": np.ones((4, 4), dtype) for name, dtype in added.items()}
    with pytest.raises(PipelineError, match=f"these weights are .*{named}.*save it in bfloat16"):
        read_target(rewritten(directory, config, tensors | more), WeightFormat())


def test_a_config_with_a_byte_order_mark_is_read(target):
    directory, config, _ = target
    (directory / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(config).encode())
    assert read_target_config(directory) == GptOssConfig.from_hf(tiny_models.TARGET)


@pytest.mark.parametrize("text", ["[]", '"gpt_oss"', "null"])
def test_a_config_that_is_no_object_is_refused(target, text):
    directory, _, _ = target
    (directory / "config.json").write_text(text)
    with pytest.raises(PipelineError, match=r"config\.json holds a .*, wanted an object"):
        read_target(directory, WeightFormat())
    with pytest.raises(PipelineError, match=r"config\.json holds a .*, wanted an object"):
        read_draft_config(directory)


BROKEN = {
    "an unknown kind": (
        {"layer_types": ["chunked_attention", "full_attention"] * 2},
        "layer_types: found chunked_attention, wanted sliding_",
    ),
    "too few kinds": ({"layer_types": ["full_attention"]}, "layer_types: found 1 kinds, wanted one for each of 4"),
    "kinds that are no list": ({"layer_types": "full_attention"}, "layer_types: found 'full_attention', wanted a list"),
    "a number as text": ({"hidden_size": "48"}, "hidden_size: found '48', wanted a positive whole number"),
    "a fraction": ({"num_hidden_layers": 4.0}, "num_hidden_layers: found 4.0, wanted a positive whole number"),
    "a negative number": ({"head_dim": -2}, "head_dim: found -2, wanted a positive whole number"),
    "true": ({"vocab_size": True}, "vocab_size: found True, wanted a positive whole number"),
    "eps as text": ({"rms_norm_eps": "1e-5"}, "rms_norm_eps: found '1e-5', wanted a positive number"),
    "theta as text": ({"rope_theta": "150000"}, "rope_theta: found '150000', wanted a positive number"),
    "RoPE as a list": ({"rope_parameters": [1]}, r"has \[1\] as rope_parameters"),
    "heads": ({"num_key_value_heads": 4}, r"num_attention_heads: found 6, wanted a multiple of num_key_"),
    "experts": ({"num_experts_per_tok": 6}, r"num_experts_per_tok: found 6, wanted at most num_local_experts \(5\)"),
}


@pytest.mark.parametrize(("change", "problem"), BROKEN.values(), ids=BROKEN.keys())
def test_a_config_that_cannot_be_meant_is_refused_with_file_key_found_and_wanted(target, change, problem):
    directory, config, tensors = target
    with pytest.raises(PipelineError, match=rf"{directory}/config\.json is not a GPT-OSS.*(\n.*)*{problem}"):
        read_target(rewritten(directory, config | change, tensors), WeightFormat())


def test_an_adapter_is_no_target(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(PipelineError, match=r"is a PEFT adapter and no model; set target\.path .* and target\.adapter"):
        read_target(tmp_path, WeightFormat())
