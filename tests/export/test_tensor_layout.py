"""The written directory against what is published about the layout: docs/dflash.md#tensors.

Names, keys and values are spelled out here from its tables; nothing is taken from the code that writes them.
"""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from omegaconf import OmegaConf
from safetensors import safe_open

from pipeline.config.schema import ArchitectureConfig, DraftConfig
from pipeline.errors import PipelineError
from pipeline.export.tensor_layout import require_layout, tensor_shapes
from pipeline.export.write import write_draft
from pipeline.model.dflash import weights as dflash_weights
from pipeline.model.hf import dflash as hf_dflash
from pipeline.model.hf import safetensors_files
from pipeline.model.hf.directory import save_draft, weight_paths
from pipeline.model.layers.linear import is_stored_transposed
from pipeline.model.layers.rope import Rope
from pipeline.workspace import specs
from tests.support import training as tiny_training
from tests.support.paths import ROOT

CONF = ROOT / "conf"
TOKEN_IDS = {"bos_token_id": 199998, "eos_token_id": 200002, "pad_token_id": 199999}
MASK_TOKEN_ID = 200000
YARN = Rope(theta=150000.0, factor=32.0, truncate=False, original_max_position_embeddings=4096)

# docs/dflash.md#tensors: those of a gpt-oss draft, [out, in]
ENDS = {"fc.weight": [2880, 14400], "hidden_norm.weight": [2880], "norm.weight": [2880]}
LAYER = {
    "input_layernorm.weight": [2880],
    "post_attention_layernorm.weight": [2880],
    "self_attn.q_proj.weight": [4096, 2880],
    "self_attn.k_proj.weight": [512, 2880],
    "self_attn.v_proj.weight": [512, 2880],
    "self_attn.o_proj.weight": [2880, 4096],
    "self_attn.q_norm.weight": [64],
    "self_attn.k_norm.weight": [64],
    "mlp.gate_proj.weight": [7680, 2880],
    "mlp.up_proj.weight": [7680, 2880],
    "mlp.down_proj.weight": [2880, 7680],
}
BIASES = {
    "self_attn.q_proj.bias": [4096],
    "self_attn.k_proj.bias": [512],
    "self_attn.v_proj.bias": [512],
    "self_attn.o_proj.bias": [2880],
}
# docs/dflash.md#config-file, for gpt-oss-20b; B is 8, and T 1e6, which every runtime's own default agrees with
CONFIG = {
    "architectures": ["DFlashDraftModel"],
    "model_type": "qwen3",
    "dtype": "bfloat16",
    "torch_dtype": "bfloat16",
    "vocab_size": 201088,
    "hidden_size": 2880,
    "target_hidden_size": 2880,
    "num_hidden_layers": 8,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 7680,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "rms_norm_eps": 1e-5,
    "layer_types": ["full_attention"] * 8,
    "is_causal": False,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 1e6,
    "rope_scaling": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "num_target_layers": 24,
    "block_size": 8,
    "tie_word_embeddings": False,
    "use_cache": True,
    "initializer_range": 0.02,
    "bos_token_id": 199998,
    "eos_token_id": 200002,
    "pad_token_id": 199999,
    "dflash_config": {
        "block_size": 8,
        "mask_token_id": 200000,
        "target_layer_ids": [1, 6, 11, 16, 21],
        "causal": False,
    },
}
NUM_PARAMETERS = {False: 784_703_104, True: 784_767_104}  # docs/dflash.md#tensors, without and with biases

# docs/dflash.md#readers: who reads which key where, and what breaks it; every reader must find a value it takes
READERS = {
    "z-lab: num_target_layers is always evaluated": lambda config: config["num_target_layers"] == 24,
    "z-lab: layers are causal by is_causal": lambda config: config["is_causal"] is False,
    "z-lab, SGLang: block size in dflash_config": lambda config: config["dflash_config"]["block_size"] == 8,
    "tpu-inference: block size at top level alone": lambda config: config["block_size"] == 8,
    "tpu-inference: a mask id that lacks is 0 in silence": lambda config: (
        config["dflash_config"]["mask_token_id"] == 200000
    ),
    "SGLang: no mask token by its text": lambda config: "mask_token" not in str(config).replace("mask_token_id", ""),
    "SGLang, vLLM: the class by its architecture": lambda config: config["architectures"] == ["DFlashDraftModel"],
    "vLLM: features in ascending order": lambda config: (
        config["dflash_config"]["target_layer_ids"] == sorted(config["dflash_config"]["target_layer_ids"])
    ),
    "vLLM: dflash_config.causal, before is_causal": lambda config: config["dflash_config"]["causal"] is False,
    "vLLM: no windows by dflash_config": lambda config: "use_swa" not in config["dflash_config"],
    "sglang-jax: int(target_hidden_size)": lambda config: type(config["target_hidden_size"]) is int,
    "sglang-jax: theta at top level": lambda config: config["rope_theta"] == 1e6,
    "transformers 5: theta in rope_parameters": lambda config: config["rope_parameters"]["rope_theta"] == 1e6,
    "transformers 4: no scaling beside it": lambda config: config["rope_scaling"] is None,
    "all: nothing that needs code of the directory's own": lambda config: "auto_map" not in config,
    "all: ids are integers, not true": lambda config: all(
        type(one) is int
        for one in (config["dflash_config"]["mask_token_id"], *config["dflash_config"]["target_layer_ids"])
    ),
    # two places that can differ one day: whoever reads the top level first finds nothing there and reads on
    "all: ids and mask in one place alone": lambda config: not {"target_layer_ids", "mask_token_id"} & config.keys(),
}


@pytest.fixture(scope="module")
def gpt_oss_draft():
    """The draft that target=gpt_oss_20b trains unless a person says otherwise."""
    chosen = OmegaConf.load(CONF / "target" / "gpt_oss_20b.yaml")
    draft = OmegaConf.load(CONF / "draft" / "gpt_oss_20b.yaml")
    model = specs.architecture(ArchitectureConfig(**chosen.target.architecture))
    return specs.draft_sizes(DraftConfig(**draft), model, MASK_TOKEN_ID)


def tensors_of_the_table(*, bias):
    layer = LAYER | (BIASES if bias else {})
    return ENDS | {f"layers.{index}.{name}": shape for index in range(8) for name, shape in layer.items()}


@pytest.mark.parametrize("bias", [False, True], ids=["no biases", "biases"])
def test_a_gpt_oss_draft_has_the_published_tensors_and_no_other(gpt_oss_draft, bias):
    config = dataclasses.replace(gpt_oss_draft, attention_bias=bias)
    wanted = tensors_of_the_table(bias=bias)
    assert sum(int(np.prod(shape)) for shape in wanted.values()) == NUM_PARAMETERS[bias]
    assert len(wanted) == (123 if bias else 91)
    assert tensor_shapes(config) == wanted
    shapes = weight_paths(dflash_weights.weight_shapes(config, jnp.bfloat16))  # nothing is allocated
    by_path = {path: leaf.shape for path, leaf in shapes}
    written = hf_dflash.expected_draft_tensors(by_path, is_transposed=is_stored_transposed(jnp.bfloat16))
    assert {name: list(one.shape) for name, one in written.items()} == wanted


def test_the_config_of_a_gpt_oss_draft_is_the_recommended_one_key_by_key(gpt_oss_draft):
    written = json.loads(json.dumps(hf_dflash.config_to_hf(gpt_oss_draft, "bfloat16", TOKEN_IDS)))
    assert written == CONFIG


def test_the_example_config_of_the_reference_is_read(gpt_oss_draft):
    """The one of docs/dflash.md#config-file, with GPT-OSS's own theta and without `causal`."""
    inner = {key: value for key, value in CONFIG["dflash_config"].items() if key != "causal"}
    theta = {"rope_theta": 150000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0}}
    found = hf_dflash.config_from_hf(CONFIG | theta | {"dflash_config": inner})
    assert found == dataclasses.replace(gpt_oss_draft, rope=Rope(theta=150000.0))


@pytest.mark.parametrize("block_size", [8, 10, 16])
@pytest.mark.parametrize("reader", READERS.values(), ids=READERS.keys())
def test_every_reader_finds_what_it_reads(gpt_oss_draft, reader, block_size):
    config = dataclasses.replace(gpt_oss_draft, block_size=block_size)
    written = hf_dflash.config_to_hf(config, "bfloat16", TOKEN_IDS)
    read = json.loads(json.dumps(written).replace(f'"block_size": {block_size}', '"block_size": 8'))
    assert reader(read)


def test_yarn_is_written_in_both_spellings(gpt_oss_draft):
    written = hf_dflash.config_to_hf(dataclasses.replace(gpt_oss_draft, rope=YARN), "bfloat16", TOKEN_IDS)
    scaling = {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
    }
    assert written["rope_theta"] == 150000.0
    assert written["rope_scaling"] == scaling
    assert written["rope_parameters"] == scaling | {"rope_theta": 150000.0}


def test_a_written_file_holds_bfloat16_under_unprefixed_names(tmp_path):
    write_draft(tmp_path, tiny_training.draft_of(0), TOKEN_IDS)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert {opened.get_slice(name).get_dtype() for name in opened.keys()} == {"BF16"}  # noqa: SIM118
        assert {name.split(".")[0] for name in opened.keys()} == {"fc", "hidden_norm", "norm", "layers"}  # noqa: SIM118


def test_a_file_in_another_layout_is_refused_with_every_fault(tmp_path):
    plain = tiny_training.DRAFT
    save_draft(tmp_path, tiny_training.draft_of(0), TOKEN_IDS)
    file = tmp_path / safetensors_files.WEIGHTS_FILE
    require_layout(file, plain, "F32")
    with pytest.raises(PipelineError) as caught:
        require_layout(file, dataclasses.replace(plain, num_hidden_layers=1, intermediate_size=29), "F32")
    message = str(caught.value)
    assert "layers.1.mlp.up_proj.weight: found ('F32', [28, 20]), wanted nothing" in message
    assert "layers.0.mlp.down_proj.weight: found ('F32', [20, 28]), wanted ('F32', [20, 29])" in message
    with pytest.raises(PipelineError, match=r"fc\.weight: found \('F32'"):
        require_layout(file, plain, "BF16")


@pytest.mark.parametrize("bias", [False, True], ids=["no biases", "biases"])
def test_a_tensor_lost_on_the_way_to_the_file_is_refused(tmp_path, monkeypatch, bias):
    config = dataclasses.replace(tiny_training.DRAFT, attention_bias=bias)
    to_files = hf_dflash.to_files
    monkeypatch.setattr(hf_dflash, "to_files", lambda leaves: dict(list(to_files(leaves).items())[:-1]))
    with pytest.raises(PipelineError, match="wanted \\('BF16'"):
        write_draft(tmp_path, tiny_training.draft_of(0, config), TOKEN_IDS)
