"""The draft in z-lab's HF layout: its `config.json`, and where its weights are in the files.

Source: docs/dflash.md#tensors and docs/dflash.md#config-file.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.errors import PipelineError
from pipeline.model.dflash.config import DFlashConfig
from pipeline.model.hf.safetensors_files import Expected
from pipeline.model.hf.tensor_source import Source, transposed, unchanged
from pipeline.model.layers.config_values import is_number, is_whole
from pipeline.model.layers.rope import Rope

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
_INNER = {"tapped_layers": "target_layer_ids", "mask_token_id": "mask_token_id", "block_size": "block_size"}
# values that an absent or null key has too
_PLAIN_INNER = {
    "causal": False,
    "use_swa": False,
    "input_embedding_scale": 1,
    "output_multiplier": 1,
    "final_logit_softcapping": None,
}
_PLAIN = {"hidden_act": "silu", "is_causal": False, **_PLAIN_INNER}
_MATRICES = {"fuse", "query", "key", "value", "output", "gate", "up", "down"}


def config_to_hf(config: DFlashConfig, dtype: str, token_ids: Mapping[str, int]) -> dict[str, Any]:
    """Returns the draft's `config.json`: every key that a runtime reads, RoPE in both spellings.

    `dtype` names the precision of the weights; `token_ids` holds bos, eos and pad (docs/dflash.md#config-file).
    """
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
        **config.rope.to_hf_spellings(),
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


def config_from_hf(config: dict[str, Any], file: Any = "config.json") -> DFlashConfig:
    """Reads a draft's `config.json`, ours or a published one (docs/dflash.md#published-drafts).

    The three values of `dflash_config` may be at top level instead; RoPE may be in either spelling. Raises
    PipelineError that names `file` and every key that is missing, contradicts another one, or asks for another
    network.
    """
    sizes = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "head_dim num_target_layers rms_norm_eps"
    ).split()
    found = {field: _twice(config, key) for field, key in _INNER.items()} | {key: config.get(key) for key in sizes}
    wrong = [f"{key}: missing" for key, value in found.items() if value is None]
    wrong += _misfits(found, sizes) or _contradictions(config) + _unsupported(config)
    if not wrong:
        wrong = _impossible(found)
    try:
        rope = Rope.from_hf(config)
    except PipelineError as error:
        wrong.append(str(error))
    if wrong:
        raise PipelineError(f"{file} is not a draft that can be run:\n  " + "\n  ".join(wrong))
    found["tapped_layers"] = tuple(found["tapped_layers"])
    return DFlashConfig(
        **found,
        rope=rope,
        attention_bias=bool(config.get("attention_bias", False)),
        max_position_embeddings=config.get("max_position_embeddings", 131072),
    )


def _inner(config: dict[str, Any]) -> dict[str, Any]:
    inner = config.get("dflash_config")
    return inner if isinstance(inner, dict) else {}


def _twice(config: dict[str, Any], key: str) -> Any:
    """Returns a value that runtimes look for in `dflash_config`, then at top level."""
    value = _inner(config).get(key)
    return config.get(key) if value is None else value


def _misfits(found: dict[str, Any], sizes: list[str]) -> list[str]:
    """Returns the values that are of another kind than runtimes take."""
    wrong = []
    for key in sizes:
        value = found[key]
        is_kind, kind = (is_number, "number") if key == "rms_norm_eps" else (is_whole, "whole number")
        if value is not None and not (is_kind(value) and value > 0):
            wrong.append(f"{key}: found {value!r}, wanted a positive {kind}")
    if not isinstance(found["tapped_layers"] or [], list):
        wrong.append(f"target_layer_ids: found {found['tapped_layers']!r}, wanted a list of layers")
    return wrong


def _contradictions(config: dict[str, Any]) -> list[str]:
    """Returns the keys whose two values differ; runtimes do not agree which one they read first."""
    pairs = {key: (_inner(config).get(key), config.get(key)) for key in _INNER.values()}
    return [
        f"{key}: {inner} in dflash_config, {outer} at top level; they must agree"
        for key, (inner, outer) in pairs.items()
        if inner is not None and outer is not None and inner != outer
    ]


def _unsupported(config: dict[str, Any]) -> list[str]:
    """Returns the keys whose values ask for another network than that of model/dflash."""
    wrong = []
    if "DFlashDraftModel" not in (config.get("architectures") or []):
        wrong.append(f"architectures: found {config.get('architectures')}, wanted ['DFlashDraftModel']")
    for key, wanted in _PLAIN.items():
        value = (_inner(config) if key in _PLAIN_INNER else config).get(key)
        if value is not None and value != wanted:
            wrong.append(f"{key}: found {value}, wanted {wanted}")
    kinds = set(config.get("layer_types") or [])
    if kinds - {"full_attention"} or (not kinds and config.get("use_sliding_window")):
        wrong.append(f"layer_types: found {sorted(kinds) or 'sliding windows'}, wanted full_attention alone")
    if config.get("draft_vocab_size") not in (None, config.get("vocab_size")):
        wrong.append(f"draft_vocab_size: found {config['draft_vocab_size']}, wanted the target's vocabulary")
    if config.get("target_hidden_size") not in (None, config.get("hidden_size")):
        wrong.append(f"target_hidden_size: found {config['target_hidden_size']}, wanted the draft's hidden_size")
    return wrong


def _impossible(found: dict[str, Any]) -> list[str]:
    """Returns the values that are out of range."""
    wrong = []
    ids, last = found["tapped_layers"], found["num_target_layers"] - 2
    if not ids or any(not is_whole(layer) for layer in ids) or sorted(set(ids)) != ids or ids[0] < 0 or ids[-1] > last:
        wrong.append(
            f"target_layer_ids: found {ids}, wanted ascending layers of 0..{last} (runtimes take features in "
            "ascending order, and the last layer's output only after the final norm)"
        )
    mask = found["mask_token_id"]
    if not is_whole(mask) or not 0 <= mask < found["vocab_size"]:
        wrong.append(f"mask_token_id: found {mask!r}, wanted an id below vocab_size ({found['vocab_size']})")
    if not is_whole(found["block_size"]) or found["block_size"] < 2:
        wrong.append(f"block_size: found {found['block_size']!r}, wanted at least 2")
    return wrong


def tensor_name(path: str) -> str:
    """Returns the name in a draft's file of the weight at `path`; it has no prefix, for every runtime reads it so."""
    if not path.startswith("layers."):
        return _NAMES[path]
    _, index, field = path.split(".", 2)
    return f"layers.{index}.{_NAMES[field]}"


def source_of(path: str, *, is_transposed: bool) -> Source:
    """Returns where the weight at `path` is in the file."""
    swapped = _is_matrix(path) and not is_transposed
    return transposed(tensor_name(path)) if swapped else unchanged(tensor_name(path))


def expected_draft_tensors(shapes: Mapping[str, tuple[int, ...]], *, is_transposed: bool) -> dict[str, Expected]:
    """Returns every tensor that the file of a draft holds, from the shapes of our weights by path."""
    tensors = {}
    for path, shape in shapes.items():
        swapped = _is_matrix(path) and not is_transposed
        tensors[tensor_name(path)] = Expected(shape[::-1] if swapped else shape)
    return tensors


def to_files(leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the tensors of a draft's file; `leaves` are the weights by path, with matrices [in, out]."""
    return {tensor_name(path): array.T if _is_matrix(path) else array for path, array in leaves.items()}


def _is_matrix(path: str) -> bool:
    return path.rpartition(".")[2] in _MATRICES
