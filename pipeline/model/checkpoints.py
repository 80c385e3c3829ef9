"""HF directories of the target and the draft: which tensor is which weight, reading and writing.

Kernels are [in, out] here and [out, in] in the files; the experts' gate and up columns are interleaved in
the files and apart here. Layouts: transformers GptOssForCausalLM; ../shared/reference/dflash.md section 2.1.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pipeline.artifacts import PipelineError, file_sha256, fingerprint_of, write_json
from pipeline.model import draft, gpt_oss
from pipeline.model.draft import DraftConfig, DraftWeights
from pipeline.model.gpt_oss import GptOssConfig, GptOssWeights
from pipeline.model.rope import Rope

Weights = TypeVar("Weights", GptOssWeights, DraftWeights)
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_TARGET_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
    "input_norm": "input_layernorm.weight",
    "query": "self_attn.q_proj.weight",
    "query_bias": "self_attn.q_proj.bias",
    "key": "self_attn.k_proj.weight",
    "key_bias": "self_attn.k_proj.bias",
    "value": "self_attn.v_proj.weight",
    "value_bias": "self_attn.v_proj.bias",
    "output": "self_attn.o_proj.weight",
    "output_bias": "self_attn.o_proj.bias",
    "sinks": "self_attn.sinks",
    "experts_norm": "post_attention_layernorm.weight",
    "experts.router": "mlp.router.weight",
    "experts.router_bias": "mlp.router.bias",
    "experts.gate_up": "mlp.experts.gate_up_proj",
    "experts.gate_up_bias": "mlp.experts.gate_up_proj_bias",
    "experts.down": "mlp.experts.down_proj",
    "experts.down_bias": "mlp.experts.down_proj_bias",
}
_DRAFT_NAMES = {
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
_TRANSPOSED = {"head", "query", "key", "value", "output", "experts.router", "fuse", "gate", "up", "down"}
_INTERLEAVED = {"experts.gate_up", "experts.gate_up_bias"}


def weight_paths(weights: Any) -> list[tuple[str, Any]]:
    """Every leaf of a weights tree with its dotted path, such as `layers.0.experts.router`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(weights)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves]


def target_tensor_name(path: str) -> str:
    """The name in an HF GPT-OSS file of the weight at `path`."""
    return _tensor_name(path, _TARGET_NAMES, "model.layers")


def draft_tensor_name(path: str) -> str:
    """The name in an exported draft's file of the weight at `path`; no prefix, every runtime reads it so."""
    return _tensor_name(path, _DRAFT_NAMES, "layers")


def _tensor_name(path: str, names: Mapping[str, str], layers: str) -> str:
    if not path.startswith("layers."):
        return names[path]
    _, index, field = path.split(".", 2)
    return f"{layers}.{index}.{names[field]}"


def _field(path: str) -> str:
    return path.split(".", 2)[2] if path.startswith("layers.") else path


def _from_file(field: str, array: np.ndarray) -> np.ndarray:
    if field in _TRANSPOSED:
        return array.T
    if field in _INTERLEAVED:
        return np.moveaxis(array.reshape(*array.shape[:-1], -1, 2), -1, -2)
    return array


def _to_file(field: str, array: np.ndarray) -> np.ndarray:
    if field in _TRANSPOSED:
        array = array.T
    elif field in _INTERLEAVED:
        array = np.moveaxis(array, -2, -1).reshape(*array.shape[:-2], -1)
    return np.ascontiguousarray(array)  # safetensors writes a transposed view's bytes in the wrong order


def read_config(directory: Path) -> dict[str, Any]:
    """The HF `config.json` of a directory; PipelineError when there is none or it is not JSON."""
    file = directory / "config.json"
    if not file.is_file():
        raise PipelineError(f"no config.json in {directory}; give the directory of an HF checkpoint")
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise PipelineError(f"{file} is not JSON: {error}") from error


def load_target(directory: Path, dtype: DTypeLike) -> tuple[GptOssConfig, GptOssWeights]:
    """Read a GPT-OSS model from bf16 or f32 safetensors, in one file or many."""
    config = GptOssConfig.from_hf(read_config(directory))
    shapes = jax.eval_shape(lambda: gpt_oss.random_weights(config, jax.random.key(0)))
    return config, _load(directory, shapes, target_tensor_name, dtype)


def save_target(directory: Path, config: GptOssConfig, weights: GptOssWeights, token_ids: Mapping[str, int]) -> None:
    """Write a GPT-OSS model that transformers opens unmodified; `token_ids` holds bos, eos and pad."""
    _save(directory, weights, target_tensor_name)
    dtype = jnp.dtype(weights.embedding.dtype).name
    write_json(directory / "config.json", {**config.to_hf(), **token_ids, "dtype": dtype})


def load_draft(directory: Path, dtype: DTypeLike) -> tuple[DraftConfig, DraftWeights]:
    """Read a draft in z-lab's HF layout."""
    config = draft_config_from_hf(read_config(directory))
    shapes = jax.eval_shape(lambda: draft.random_weights(config, jax.random.key(0)))
    return config, _load(directory, shapes, draft_tensor_name, dtype)


def save_draft(directory: Path, config: DraftConfig, weights: DraftWeights, token_ids: Mapping[str, int]) -> None:
    """Write a draft in z-lab's HF layout, in the precision of `weights`."""
    _save(directory, weights, draft_tensor_name)
    dtype = jnp.dtype(weights.fuse.dtype).name
    write_json(directory / "config.json", draft_config_to_hf(config, dtype, token_ids))


def draft_config_to_hf(config: DraftConfig, dtype: str, token_ids: Mapping[str, int]) -> dict[str, Any]:
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


def draft_config_from_hf(config: dict[str, Any]) -> DraftConfig:
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


def weights_fingerprint(directory: Path) -> str:
    """sha256 over the names and bytes of a directory's safetensors files."""
    return fingerprint_of({file.name: file_sha256(file) for file in _weight_files(directory)})


def config_fingerprint(directory: Path) -> str:
    """sha256 of a directory's config.json, whatever its formatting."""
    return fingerprint_of(read_config(directory))


def _weight_files(directory: Path) -> list[Path]:
    index = directory / INDEX_FILE
    weight_map = json.loads(index.read_text())["weight_map"] if index.is_file() else {"": WEIGHTS_FILE}
    names = sorted(set(weight_map.values()))
    absent = [name for name in names if not (directory / name).is_file()]
    if absent:
        raise PipelineError(f"{directory} lacks {', '.join(absent)}; copy the whole HF checkpoint")
    return [directory / name for name in names]


def _load(directory: Path, shapes: Weights, name_of: Callable[[str], str], dtype: DTypeLike) -> Weights:
    """Read every tensor of a weights tree, naming all that are missing, unexpected, misshapen or not finite."""
    try:
        files = [safe_open(file, framework="flax") for file in _weight_files(directory)]
    except SafetensorError as error:
        raise PipelineError(f"{directory}: damaged safetensors file ({error}); copy it again") from error
    where = {name: file for file in files for name in file.keys()}  # noqa: SIM118 (not a mapping)
    paths = weight_paths(shapes)
    wanted = {name_of(path) for path, _ in paths}
    problems = [f"{name}: unexpected" for name in sorted(where.keys() - wanted)]
    leaves = []
    for path, shape in paths:
        name, field = name_of(path), _field(path)
        if name not in where:
            problems.append(f"{name}: missing")
            continue
        array = _from_file(field, np.asarray(where[name].get_tensor(name)))
        if array.shape != shape.shape:
            problems.append(f"{name}: shape {array.shape} as read, wanted {shape.shape} ([in, out])")
        elif not np.isfinite(array.astype(np.float32)).all():
            problems.append(f"{name}: not finite")
        else:
            leaves.append(jnp.asarray(array, dtype=dtype))
    if problems:
        raise PipelineError(f"{directory}: {len(problems)} tensor(s) wrong\n  " + "\n  ".join(problems))
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def _save(directory: Path, weights: Any, name_of: Callable[[str], str]) -> None:
    tensors = {name_of(path): _to_file(_field(path), np.asarray(leaf)) for path, leaf in weight_paths(weights)}
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
