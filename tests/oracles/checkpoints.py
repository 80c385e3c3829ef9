"""Loads both networks in float32, refusing any checkpoint that does not fit the class exactly."""

import json
from pathlib import Path

import torch
from dflash.model import DFlashDraftModel
from safetensors import safe_open
from transformers import GptOssForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from transformers.utils import logging

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
logging.set_verbosity_error()
logging.disable_progress_bar()

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_target(directory: Path) -> GptOssForCausalLM:
    """Eager attention and eager experts; ValueError on missing or unexpected tensors."""
    model, report = GptOssForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    _refuse(directory, report)
    if getattr(model.config, "swiglu_limit", None) is not None:  # this version has 7.0 in its code, later ones read it
        for layer in model.model.layers:
            layer.mlp.experts.limit = model.config.swiglu_limit
    return model.float().eval()


def load_draft(directory: Path) -> DFlashDraftModel:
    """As `load_target`. Names must be unprefixed too: only transformers forgives a `model.`."""
    model, report = DFlashDraftModel.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    wanted, found = set(model.state_dict()), stored_names(directory)
    report["missing_keys"] = set(report["missing_keys"]) | (wanted - found)
    report["unexpected_keys"] = set(report["unexpected_keys"]) | (found - wanted)
    _refuse(directory, report)
    return model.float().eval()


def load_llama(file: Path) -> LlamaForCausalLM:
    """A Llama out of a GGUF file by transformers' own reader; ValueError on missing or unexpected tensors."""
    found = load_gguf_checkpoint(file, return_tensors=False)["config"]
    config = LlamaConfig(**{key: value for key, value in found.items() if not key.startswith("_")})
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config).float()
    tensors = load_gguf_checkpoint(file, return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    _refuse(file, {"missing_keys": set(missing) - tied, "unexpected_keys": unexpected})
    return model.eval()


def stored_names(directory: Path) -> set[str]:
    """Tensor names in every safetensors file of a directory."""
    names: set[str] = set()
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names |= set(file.keys())
    return names


def read_config(path: Path, model_type: str) -> dict:
    """A config JSON; ValueError unless it names the model type, as loading it again needs."""
    config = json.loads(path.read_text())
    if config.get("model_type") != model_type:
        found = config.get("model_type")
        raise ValueError(f"model_type in {path} is {found!r}; it must be {model_type!r}")
    return config


def _refuse(directory: Path, report: dict) -> None:
    offenders = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    if offenders:
        raise ValueError(f"{directory} does not fit the model: {offenders}")
