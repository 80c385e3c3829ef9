"""The draft in z-lab's HF layout: its `config.json` and where its weights are.

Source: ../shared/reference/dflash.md sections 2.1 and 2.5.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.artifacts import PipelineError
from pipeline.model.draft import DraftConfig
from pipeline.model.rope import Rope
from pipeline.model.source import Source, as_it_is, transposed
from pipeline.model.tensor_files import Expected

_NAMES = {
    "fuse": "fc.weight",
    "context_norm": "hidden_norm.weight",
    "norm": "norm.weight",
    "input_norm": "input_layernorm.weight",
    "query": "self_attn.q_proj.weight",
    "query_bias": "self_attn.q_proj.bias",
    "key": "self_attn.k_proj.weight",
    "key_bias": "self_attn.k_proj.bias",
    "value": "self_attn.v_proj.weight",
    "value_bias": "self_attn.v_proj.bias",
    "output": "self_attn.o_proj.weight",
    "output_bias": "self_attn.o_proj.bias",
    "query_norm": "self_attn.q_norm.weight",
    "key_norm": "self_attn.k_norm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}
_KERNELS = {"fuse", "query", "key", "value", "output", "gate", "up", "down"}


def config_to_hf(config: DraftConfig, dtype: str, token_ids: Mapping[str, int]) -> dict[str, Any]:
    """The draft's `config.json`: all keys any runtime reads, both spellings of RoPE (dflash.md section 2.5)."""
    rope = config.rope.to_hf()
    legacy = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "dtype": dtype,
        "torch_dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "target_hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
        "rms_norm_eps": config.rms_norm_eps,
        "layer_types": ["full_attention"] * config.num_hidden_layers,
        "is_causal": False,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": config.num_hidden_layers,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope.theta,
        "rope_scaling": None if config.rope.factor is None else legacy,
        "rope_parameters": rope,
        "num_target_layers": config.num_target_layers,
        "block_size": config.block_size,
        "tie_word_embeddings": False,
        "use_cache": True,
        "initializer_range": 0.02,
        **token_ids,
        "dflash_config": {
            "block_size": config.block_size,
            "mask_token_id": config.mask_token_id,
            "target_layer_ids": list(config.tapped_layers),
            "causal": False,
        },
    }


def config_from_hf(config: dict[str, Any]) -> DraftConfig:
    """Read a draft's `config.json`. Raises PipelineError naming every key that is missing or not supported."""
    inner = config.get("dflash_config") or {}
    found = {
        "tapped_layers": inner.get("target_layer_ids", config.get("target_layer_ids")),
        "mask_token_id": inner.get("mask_token_id", config.get("mask_token_id")),
        "block_size": inner.get("block_size", config.get("block_size")),
    }
    sizes = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "head_dim num_target_layers rms_norm_eps"
    ).split()
    found |= {key: config.get(key) for key in sizes}
    wrong = [f"{key}: missing" for key, value in found.items() if value is None]
    if "DFlashDraftModel" not in config.get("architectures", []):
        wrong.append(f"architectures: found {config.get('architectures')}, wanted ['DFlashDraftModel']")
    if config.get("is_causal") or inner.get("causal"):
        wrong.append("is_causal: found true, wanted false (only non-causal drafts are run)")
    kinds = set(config.get("layer_types") or ["full_attention"])
    if kinds != {"full_attention"}:
        wrong.append(f"layer_types: found {sorted(kinds)}, wanted full_attention alone")
    if wrong:
        raise PipelineError("config.json is not a draft that can be run:\n  " + "\n  ".join(wrong))
    found["tapped_layers"] = tuple(found["tapped_layers"])
    return DraftConfig(
        **found,
        rope=Rope.from_hf(config),
        attention_bias=bool(config.get("attention_bias", False)),
        max_position_embeddings=config.get("max_position_embeddings", 131072),
    )


def tensor_name(path: str) -> str:
    """The name in an exported draft's file of the weight at `path`; no prefix, every runtime reads it so."""
    if not path.startswith("layers."):
        return _NAMES[path]
    _, index, field = path.split(".", 2)
    return f"layers.{index}.{_NAMES[field]}"


def source_of(path: str, *, lies_transposed: bool) -> Source:
    """Where the weight at `path` is in the file."""
    swapped = _is_kernel(path) and not lies_transposed
    return transposed(tensor_name(path)) if swapped else as_it_is(tensor_name(path))


def expected_tensors(shapes: Mapping[str, tuple[int, ...]], *, lies_transposed: bool) -> dict[str, Expected]:
    """Every tensor that the file of a draft holds, of the shapes of our weights by path."""
    found = {}
    for path, shape in shapes.items():
        swapped = _is_kernel(path) and not lies_transposed
        found[tensor_name(path)] = Expected(shape[::-1] if swapped else shape)
    return found


def to_files(leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of weights, `leaves` by path with kernels [in, out], as the file has them."""
    return {tensor_name(path): array.T if _is_kernel(path) else array for path, array in leaves.items()}


def _is_kernel(path: str) -> bool:
    return path.rpartition(".")[2] in _KERNELS
