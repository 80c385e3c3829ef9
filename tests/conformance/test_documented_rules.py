"""An exported draft against the rules of the runtimes that cannot be installed here, as their sources state them.

Source: docs/dflash.md#readers, which cites vLLM 0.33 (model_executor/models/qwen3_dflash.py,
config/speculative.py), SGLang 0.5.23 (srt/models/dflash.py, speculative/dflash_utils.py) and tpu-inference 0.32
(models/jax/dflash.py). Each function below says what such a reader would complain of, or lose without a word.
"""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from pipeline.config.fields import DRAFT
from pipeline.export.runtimes import runtimes
from pipeline.export.write import write_draft
from pipeline.model.layers.rope import Rope
from pipeline.workspace.workspace import Workspace
from tests.support import training as tiny_training

pytestmark = pytest.mark.usefixtures("compiled_quickly")
TOKEN_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
PLAIN = dataclasses.replace(tiny_training.DRAFT, block_size=8)
YARN = Rope(theta=150000.0, factor=8.0, truncate=False, original_max_position_embeddings=32)
ENDS = ("fc.weight", "hidden_norm.weight", "norm.weight")
LAYER = (
    "input_layernorm.weight post_attention_layernorm.weight self_attn.q_proj.weight self_attn.k_proj.weight "
    "self_attn.v_proj.weight self_attn.o_proj.weight self_attn.q_norm.weight self_attn.k_norm.weight "
    "mlp.gate_proj.weight mlp.up_proj.weight mlp.down_proj.weight"
).split()
BIASES = [f"self_attn.{name}_proj.bias" for name in "qkvo"]


def read(directory: Path) -> tuple[dict, dict]:
    tensors = load_file(directory / "model.safetensors")
    return json.loads((directory / "config.json").read_text()), {name: one.shape for name, one in tensors.items()}


def parameters(config: dict) -> set[str]:
    """What the draft classes of all three have, unprefixed and unfused."""
    layer = LAYER + (BIASES if config["attention_bias"] else [])
    return {*ENDS, *(f"layers.{index}.{name}" for index in range(config["num_hidden_layers"]) for name in layer)}


def width_of_fc(config: dict) -> int:
    return len(config["dflash_config"]["target_layer_ids"]) * (
        config.get("target_hidden_size") or config["hidden_size"]
    )


def vllm(directory: Path) -> list[str]:
    config, shapes = read(directory)
    inner, wrong = config["dflash_config"], []
    if not re.match("DFlash|.*DFlash$", config["architectures"][0]):
        wrong.append("no class for this architecture")
    known = {f"model.{name}" for name in parameters(config)}
    asked = {name if "lm_head" in name else f"model.{name}" for name in shapes}  # prepended whatever is there
    wrong += [f"unknown {name}" for name in asked - known]  # strict
    wrong += [f"lost {name}" for name in known - asked]  # load_weights returns None, which skips the check
    wrong += [f"{name} asserts" for name in shapes if "mask_hidden" in name]
    if shapes.get("fc.weight", (0, 0))[1] != width_of_fc(config):
        wrong.append("fc does not take what is captured")
    if inner["target_layer_ids"] != sorted(inner["target_layer_ids"]):
        wrong.append("features come in ascending order of layers")
    if config.get("is_causal", inner.get("causal")) or "use_swa" in inner:
        wrong.append("attends otherwise")
    if config.get("rope_parameters", {}).get("rope_theta", config.get("rope_theta", 1e6)) != config["rope_theta"]:
        wrong.append("another theta")
    return wrong


def sglang(directory: Path) -> list[str]:
    config, shapes = read(directory)
    inner, wrong = config["dflash_config"], []
    if config["architectures"][0] != "DFlashDraftModel":
        wrong.append("no class for this architecture")
    asked = {name.removeprefix("model.") for name in shapes}  # with or without
    wrong += [f"ignored {name}" for name in asked - parameters(config)]
    wrong += [f"uninitialised {name}" for name in parameters(config) - asked]  # neither is reported
    if shapes.get("fc.weight", shapes.get("model.fc.weight", (0, 0)))[1] != width_of_fc(config):
        wrong.append("fc does not take what is captured")
    if not all(0 <= layer < config["num_target_layers"] for layer in inner["target_layer_ids"]):
        wrong.append("layers that the target lacks")
    if not isinstance(inner.get("mask_token_id"), int):
        wrong.append("a token <|MASK|> is added to the tokenizer")
    if inner.get("block_size", config.get("block_size", 16)) != config["block_size"]:
        wrong.append("another block size")
    return wrong


def tpu_inference(directory: Path) -> list[str]:
    config, shapes = read(directory)
    wrong = [f"unmapped {name}" for name in shapes if name not in parameters(config) or name.endswith(".bias")]
    wrong += [f"missing {name}" for name in parameters(config) - shapes.keys()]
    if config.get("block_size", 8) != config["dflash_config"]["block_size"]:
        wrong.append("block size 8 for want of one at top level")
    if config["dflash_config"].get("mask_token_id", 0) == 0:
        wrong.append("mask token 0 for want of one")
    return wrong


READERS = {"vLLM": vllm, "SGLang": sglang, "tpu-inference": tpu_inference}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Drafts as stage=export writes them, by kind."""
    root = tmp_path_factory.mktemp("dflash")
    kinds = {
        "plain": PLAIN,
        "16 slots": dataclasses.replace(PLAIN, block_size=16),
        "biases": dataclasses.replace(PLAIN, attention_bias=True),
        "YaRN": dataclasses.replace(PLAIN, rope=YARN),
    }
    for name, config in kinds.items():
        (root / name).mkdir()
        write_draft(root / name, tiny_training.draft_of(0, config), TOKEN_IDS)
    return root


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS.keys())
@pytest.mark.parametrize("kind", ["plain", "16 slots", "YaRN"])
def test_a_written_draft_breaks_no_rule(written, kind, reader):
    assert reader(written / kind) == []


def test_biases_are_what_tpu_inference_alone_refuses(written):
    assert vllm(written / "biases") == sglang(written / "biases") == []
    assert len(tpu_inference(written / "biases")) == 4 * PLAIN.num_hidden_layers


def broken(source: Path, directory: Path, *, rename=str, change=None) -> Path:
    shutil.copytree(source, directory)
    tensors = load_file(source / "model.safetensors")
    save_file({rename(name): one for name, one in tensors.items()}, directory / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps((change or dict)(config)))
    return directory


def inner(**values):
    return lambda config: config | {"dflash_config": config["dflash_config"] | values}


BREAKAGES = {
    "a renamed tensor": ({"rename": lambda name: name.replace("1.mlp.up_proj", "1.mlp.gate_up_proj")}, READERS),
    "a prefix": ({"rename": lambda name: f"model.{name}"}, ["vLLM", "tpu-inference"]),
    "biases told of that are not there": ({"change": lambda config: config | {"attention_bias": True}}, READERS),
    "another class": ({"change": lambda config: config | {"architectures": ["Qwen3Model"]}}, ["vLLM", "SGLang"]),
    "one layer fewer": ({"change": inner(target_layer_ids=[0])}, ["vLLM", "SGLang"]),
    "layers out of order": ({"change": inner(target_layer_ids=[2, 0])}, ["vLLM"]),
    "causal blocks": ({"change": lambda config: config | {"is_causal": True}}, ["vLLM"]),
    "two thetas": (
        {"change": lambda config: config | {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}},
        ["vLLM"],
    ),
    "a mask by its text": ({"change": inner(mask_token_id="<|MASK|>")}, ["SGLang"]),
    "a mask that tpu-inference takes for none": ({"change": inner(mask_token_id=0)}, ["tpu-inference"]),
    "two block sizes": ({"change": inner(block_size=16)}, ["SGLang", "tpu-inference"]),
}


@pytest.mark.parametrize(("how", "readers"), BREAKAGES.values(), ids=BREAKAGES.keys())
def test_a_broken_draft_breaks_a_rule(written, tmp_path, how, readers):
    directory = broken(written / "plain", tmp_path / "broken", **how)
    assert [name for name, reader in READERS.items() if reader(directory)] == list(readers)


def test_the_default_place_of_a_draft_tells_vllm_its_method():
    """vLLM takes a draft for DFlash by its path."""
    config = tiny_training.trained()
    assert "dflash" in Workspace(config).address(DRAFT).name


@pytest.mark.parametrize("block_size", [4, 8, 10, 16])
def test_the_commands_ask_for_as_many_tokens_as_a_block_drafts(block_size):
    config = dataclasses.replace(PLAIN, block_size=block_size)
    commands = {one.name: one.command for one in runtimes(config, "openai/gpt-oss-20b", "target=gpt_oss_20b")}
    assert re.search(r'"num_speculative_tokens": (\d+)', commands["vLLM"])[1] == str(block_size - 1)
    assert re.search(r"--speculative-num-draft-tokens (\d+)", commands["SGLang"])[1] == str(block_size)
    drafted = re.search(r"--speculative-config '(.*)'", commands["vLLM"])[1]
    assert json.loads(drafted)["method"] == "dflash"
