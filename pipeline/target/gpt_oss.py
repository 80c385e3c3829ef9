"""Reads a GPT-OSS model out of llama.cpp's GGUF: its `config.json`, and its tensors as HF's files have them.

A GGUF has gate and up apart, linear layers and experts as [out, in], and norms, biases, sinks and the router in
float32 that was bfloat16 before. Of a block of MXFP4 it has value i in the low and value i + 16 in the high half of
byte i, HF's files have neighbours in a byte. No number is changed, except in experts that are quantised otherwise:
those are rounded to bfloat16. llama.cpp has YaRN's `truncate`, the limit of the activation and the order of sliding
and full layers in its code, and so are they here.
Source: llama.cpp, conversion of GptOssForCausalLM, `llm_build_openai_moe_iswa`; gguf's constants.
"""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import UInt8

from pipeline.errors import PipelineError
from pipeline.model.gpt_oss.config import KINDS, GptOssConfig
from pipeline.model.hf import gpt_oss as hf_gpt_oss
from pipeline.model.hf.streamed_files import DTYPES, Streamed
from pipeline.model.layers import mxfp4
from pipeline.model.layers.config_values import is_number, is_whole
from pipeline.target.gguf_file import GgufFile

ARCHITECTURE = "gpt-oss"
QUANTIZATION = {  # what HF's config.json says of a model whose experts are MXFP4
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
_SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "expert_feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "num_local_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "sliding_window": "attention.sliding_window",
    "max_position_embeddings": "context_length",
}
_FLOATS = {"rope_theta": "rope.freq_base", "rms_norm_eps": "attention.layer_norm_rms_epsilon"}
_KIND, _PATTERN = "rope.scaling.type", "attention.sliding_window_pattern"
_YARN = {
    "factor": "rope.scaling.factor",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
}
_YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0}  # llama.cpp's and HF's
_EQUAL = {"attention.value_length": "attention.key_length", "rope.dimension_count": "attention.key_length"}
_UNUSED = {"feed_forward_length", "vocab_size", "rope.scaling.finetuned"}  # of no meaning for this architecture
_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    **{
        f"self_attn.{ours}_proj.{part}": f"attn_{theirs}.{part}"
        for ours, theirs in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "output"))
        for part in ("weight", "bias")
    },
    "self_attn.sinks": "attn_sinks.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "mlp.router.weight": "ffn_gate_inp.weight",
    "mlp.router.bias": "ffn_gate_inp.bias",
    "mlp.experts.down_proj_bias": "ffn_down_exps.bias",
}
_GATE_UP, _DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
_MATRICES = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
_ENTRIES = "token_embd.weight"  # its rows are the vocabulary


def config_of(file: GgufFile) -> GptOssConfig:
    """Returns the sizes of the file's model; raises PipelineError when it is of another architecture.

    A key that may change what is computed and is not known here is refused too.
    """
    if file.architecture != ARCHITECTURE:
        raise PipelineError(f"{file.path}: general.architecture: found {file.architecture!r}, wanted {ARCHITECTURE!r}")
    found = file.values(map(_key, [*_SIZES.values(), *_FLOATS.values()]))
    known = {*_SIZES.values(), *_FLOATS.values(), *_YARN.values(), *_EQUAL, *_UNUSED, _KIND, _PATTERN}
    wrong = [
        f"{key}: found {_shown(file.get(key))}, wanted no such key, whose meaning is not known here"
        for key in sorted(file.keys)
        if key.startswith(_key("")) and key.removeprefix(_key("")) not in known
    ]
    wrong += [
        f"{_key(key)}: found {_shown(found[_key(key)])}, wanted a positive number"
        for key in (*_SIZES.values(), *_FLOATS.values())
        if not (is_number(found[_key(key)]) and found[_key(key)] > 0)
    ]
    for name, other in _EQUAL.items():
        if file.get(_key(name), found[_key(other)]) != found[_key(other)]:
            wrong.append(f"{_key(name)}: found {file.get(_key(name))}, wanted {found[_key(other)]} as {_key(other)}")
    pattern = file.get(_key(_PATTERN), 2)
    if not (isinstance(pattern, list) or (is_whole(pattern) and pattern > 0)):
        wrong.append(f"{_key(_PATTERN)}: found {_shown(pattern)}, wanted a number of layers or a list of all")
    rope = file.get(_key(_KIND), "none")
    if rope not in ("yarn", "none"):
        wrong.append(f"{_key(_KIND)}: found {rope!r}, wanted 'yarn' or 'none'")
    if _ENTRIES not in file.tensor_names:
        wrong.append(f"{_ENTRIES}: missing")
    if wrong:
        raise PipelineError(f"{file.path} is no GPT-OSS model that can be converted:\n  " + "\n  ".join(wrong))
    values: dict[str, Any] = {name: found[_key(key)] for name, key in _SIZES.items()}
    values |= {name: _plain(found[_key(key)]) for name, key in _FLOATS.items()}
    values |= {"model_type": "gpt_oss", "vocab_size": file.tensors[_ENTRIES].shape[0]}
    if rope == "yarn":
        values["rope_scaling"] = {"rope_type": "yarn", "truncate": False, **_yarn(file)}
    values["layer_types"] = _layer_types(file, values["num_hidden_layers"])
    return GptOssConfig.from_hf(values, file.path)


def _key(name: str) -> str:
    return f"{ARCHITECTURE}.{name}"


def _shown(value: Any) -> str:
    return repr(value) if len(repr(value)) < 80 else f"{repr(value)[:80]}..."


def _plain(number: float) -> float:
    """Returns the shortest number that is this one in float32: 1e-05, not the float32 next to it."""
    return float(str(np.float32(number)))


def _yarn(file: GgufFile) -> dict[str, Any]:
    found = {name: file.get(_key(key), _YARN_DEFAULTS.get(name)) for name, key in _YARN.items()}
    return {name: _plain(value) if isinstance(value, float) else value for name, value in found.items()}


def _layer_types(file: GgufFile, num_layers: int) -> list[str]:
    """Returns the kind of each layer: in turn, unless the file has a period or a list of those that slide."""
    pattern = file.get(_key(_PATTERN), 2)
    slides = pattern if isinstance(pattern, list) else [index % pattern < pattern - 1 for index in range(num_layers)]
    kinds = {sliding: kind for kind, sliding in KINDS.items()}
    return [kinds[bool(sliding)] for sliding in slides]


def is_packed(file: GgufFile, config: GptOssConfig) -> bool:
    """Returns whether the file holds all experts as MXFP4; they are written as floats where some are not."""
    names = [f"blk.{index}.{name}.weight" for index in range(config.num_hidden_layers) for name in _MATRICES]
    return all(map(file.is_mxfp4, names))


def rounded_kinds(file: GgufFile, config: GptOssConfig) -> list[str]:
    """Returns the quantisations of experts that are rounded to bfloat16."""
    if is_packed(file, config):
        return []
    experts = [name for name in file.tensors if _is_expert(name) and not file.is_mxfp4(name)]
    return sorted({file.tensors[name].kind.name for name in experts if file.tensors[name].is_quantised})


def _is_expert(name: str) -> bool:
    return name.endswith(tuple(f".{matrix}.weight" for matrix in _MATRICES))


def shards_of(file: GgufFile, config: GptOssConfig) -> list[dict[str, Streamed]]:
    """Returns the tensors of HF's files, a file for each layer and one for what is above them; reads few of them.

    Raises PipelineError that names every tensor that is missing, unexpected, misshapen or in a quantisation that
    cannot be read.
    """
    _require_tensors(file, config)
    packed = is_packed(file, config)
    layers = [_layer(file, f"blk.{index}", config, packed) for index in range(config.num_hidden_layers)]
    named = [
        {f"model.layers.{index}.{name}": tensor for name, tensor in layer.items()} for index, layer in enumerate(layers)
    ]
    return [*named, {ours: _whole(file, theirs) for ours, theirs in _TOP.items()}]


def _require_tensors(file: GgufFile, config: GptOssConfig) -> None:
    d, f, e = config.hidden_size, config.intermediate_size, config.num_local_experts
    expected = hf_gpt_oss.expected_target_tensors(config, packed=False)
    wanted = {theirs: expected[ours].shape for ours, theirs in _TOP.items()}
    for index in range(config.num_hidden_layers):
        wanted |= {
            f"blk.{index}.{theirs}": expected[f"model.layers.{index}.{ours}"].shape for ours, theirs in _LAYER.items()
        }
        for name in ("ffn_gate_exps", "ffn_up_exps"):
            wanted |= {f"blk.{index}.{name}.weight": (e, f, d), f"blk.{index}.{name}.bias": (e, f)}
        wanted[f"blk.{index}.ffn_down_exps.weight"] = (e, d, f)
    wrong = dict.fromkeys(sorted(file.tensor_names - wanted.keys()), "unexpected")
    for name, shape in wanted.items():
        if name not in file.tensor_names:
            wrong[name] = "missing"
        elif file.tensors[name].shape != shape:
            wrong[name] = f"shape {list(file.tensors[name].shape)}, wanted {list(shape)}"
    if wrong:
        listed = "\n  ".join(f"{name}: {problem}" for name, problem in wrong.items())
        raise PipelineError(f"{file.path}: {len(wrong)} tensor(s) wrong\n  {listed}")
    for name in {tensor.kind: name for name, tensor in file.tensors.items()}.values():
        file.rows(name, 0, 1)  # of each quantisation one row: whether it can be read


def _layer(file: GgufFile, prefix: str, config: GptOssConfig, packed: bool) -> dict[str, Streamed]:
    d, f, e = config.hidden_size, config.intermediate_size, config.num_local_experts
    gate, up, down = (f"{prefix}.{name}" for name in _MATRICES)
    tensors = {ours: _whole(file, f"{prefix}.{theirs}") for ours, theirs in _LAYER.items()}
    biases = (f"{gate}.bias", f"{up}.bias")
    tensors[f"{_GATE_UP}_bias"] = Streamed(
        _joined_kind(file, biases), (e, 2 * f), functools.partial(_biases, file, biases)
    )
    for name, sources, shape in (
        (_GATE_UP, (f"{gate}.weight", f"{up}.weight"), (e, 2 * f, d)),
        (_DOWN, (f"{down}.weight",), (e, d, f)),
    ):
        if packed:
            groups = (*shape[:2], shape[2] // mxfp4.BLOCK)
            blocks, scales = (functools.partial(_packed, file, sources, e, part) for part in (_blocks, _scales))
            tensors[f"{name}_blocks"] = Streamed("U8", (*groups, mxfp4.BLOCK // 2), blocks)
            tensors[f"{name}_scales"] = Streamed("U8", groups, scales)
        else:
            turned = (shape[0], shape[2], shape[1])
            tensors[name] = Streamed(_joined_kind(file, sources), turned, functools.partial(_floats, file, sources, e))
    return tensors


def _whole(file: GgufFile, name: str) -> Streamed:
    def parts() -> Iterator[np.ndarray]:
        return (_finite(file, name, part) for part in file.parts(name))

    return Streamed(_joined_kind(file, (name,)), file.tensors[name].shape, parts)


def _joined_kind(file: GgufFile, names: tuple[str, ...]) -> str:
    """Returns the smallest kind of number that holds the tensors, exactly unless they are quantised experts."""
    kinds = {_kind(file, name) for name in names}
    return kinds.pop() if len(kinds) == 1 else "F32"


def _kind(file: GgufFile, name: str) -> str:
    tensor = file.tensors[name]
    if tensor.is_quantised and _is_expert(name):
        return "BF16"
    if tensor.kind.name in ("BF16", "F16"):
        return tensor.kind.name
    bfloat16 = DTYPES["BF16"]
    return "BF16" if all((part.astype(bfloat16) == part).all() for part in file.parts(name)) else "F32"


def _biases(file: GgufFile, names: tuple[str, ...]) -> Iterator[np.ndarray]:
    gate, up = (_finite(file, name, file.rows(name)) for name in names)
    yield np.stack([gate, up], axis=-1)


def _floats(file: GgufFile, names: tuple[str, ...], num_experts: int) -> Iterator[np.ndarray]:
    """Yields the experts of gate and up, rows in turn, or of down, as [in, out]."""
    for expert in range(num_experts):
        matrices = []
        for name in names:
            rows = file.tensors[name].num_rows // num_experts
            matrices.append(_finite(file, name, file.rows(name, expert * rows, (expert + 1) * rows)))
        yield np.stack(matrices, axis=1).reshape(-1, matrices[0].shape[1]).T


def _packed(file: GgufFile, names: tuple[str, ...], num_experts: int, part: Any) -> Iterator[UInt8[np.ndarray, "..."]]:
    """Yields the blocks or the scales of each expert, the rows of gate and up in turn."""
    for expert in range(num_experts):
        matrices = []
        for name in names:
            rows = file.tensors[name].num_rows // num_experts
            stored = file.blocks(name, expert * rows, (expert + 1) * rows)
            if (stored[..., 0] > mxfp4.LARGEST_SCALE).any():
                raise PipelineError(f"{file.path}: {name} is not finite: its scales have numbers above all others")
            matrices.append(part(stored))
        yield np.stack(matrices, axis=1)


def _scales(stored: UInt8[np.ndarray, "rows groups 17"]) -> UInt8[np.ndarray, "rows groups"]:
    return stored[..., 0]


def _blocks(stored: UInt8[np.ndarray, "rows groups 17"]) -> UInt8[np.ndarray, "rows groups 16"]:
    """Returns blocks with neighbours in a byte, the first in its low half."""
    first, second = stored[..., 1::2], stored[..., 2::2]  # of neighbours; 16 further on in the high halves
    return np.concatenate([first & 15 | second << 4, first >> 4 | second & 0xF0], axis=-1)


def _finite(file: GgufFile, name: str, array: np.ndarray) -> np.ndarray:
    if not np.isfinite(array.astype(np.float32)).all():
        raise PipelineError(f"{file.path}: {name} is not finite; convert the model again")
    return array
