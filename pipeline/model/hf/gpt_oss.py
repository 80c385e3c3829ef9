"""Where the weights of a GPT-OSS model are in HF's files, and how they lie there.

Linear layers are [out, in] in the files. The columns of experts' gate and up are interleaved, [.., gate 0, up 0,
gate 1, ..]; floats lie [E, D, 2F] and [E, F, D], packed ones as if they were transposed: blocks of 16 bytes for 32
neighbours along the summed axis, [E, 2F, D/32, 16] and [E, D, F/32, 16], and a byte of scale for each block.
Source: transformers GptOssForCausalLM and its MXFP4 quantizer; github.com/openai/gpt-oss, model card section 2.
"""

import math
from collections.abc import Mapping

import numpy as np

from pipeline.errors import PipelineError
from pipeline.model.gpt_oss.config import GptOssConfig
from pipeline.model.gpt_oss.weights import WeightFormat, is_fused
from pipeline.model.hf.safetensors_files import BYTES, Expected, Index
from pipeline.model.hf.tensor_source import Source, transposed, unchanged
from pipeline.model.layers import mxfp4
from pipeline.model.layers.mxfp4 import BLOCK

PAIR = {"gate": 0, "up": 1}  # the place of a column among its neighbours
_TOP = {"embedding": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
_LAYER = {
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
    "experts.down_bias": "mlp.experts.down_proj_bias",
}
_KERNELS = {"head", "query", "key", "value", "output", "experts.router"}
_GATE_UP, _DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


def expected_target_tensors(config: GptOssConfig, *, packed: bool) -> dict[str, Expected]:
    """Every tensor that the files of this model hold."""
    d, f, e = config.hidden_size, config.intermediate_size, config.num_local_experts
    n, nh, gh = (
        config.num_attention_heads,
        config.num_attention_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
    )
    layer = {
        "input_layernorm.weight": (d,),
        "self_attn.q_proj.weight": (nh, d),
        "self_attn.q_proj.bias": (nh,),
        "self_attn.k_proj.weight": (gh, d),
        "self_attn.k_proj.bias": (gh,),
        "self_attn.v_proj.weight": (gh, d),
        "self_attn.v_proj.bias": (gh,),
        "self_attn.o_proj.weight": (d, nh),
        "self_attn.o_proj.bias": (d,),
        "self_attn.sinks": (n,),
        "post_attention_layernorm.weight": (d,),
        "mlp.router.weight": (e, d),
        "mlp.router.bias": (e,),
        f"{_GATE_UP}_bias": (e, 2 * f),
        f"{_DOWN}_bias": (e, d),
    }
    if not packed:
        layer |= {_GATE_UP: (e, d, 2 * f), _DOWN: (e, f, d)}
    found = {f"model.layers.{index}.{name}": Expected(shape) for index in range(config.num_hidden_layers)
             for name, shape in layer.items()}  # fmt: skip
    if packed:
        bytes_of_layer = {
            f"{_GATE_UP}_blocks": (e, 2 * f, d // BLOCK, BLOCK // 2),
            f"{_GATE_UP}_scales": (e, 2 * f, d // BLOCK),
            f"{_DOWN}_blocks": (e, d, f // BLOCK, BLOCK // 2),
            f"{_DOWN}_scales": (e, d, f // BLOCK),
        }
        found |= {f"model.layers.{index}.{name}": Expected(shape, BYTES) for index in range(config.num_hidden_layers)
                  for name, shape in bytes_of_layer.items()}  # fmt: skip
    top = {"embedding": (config.vocab_size, d), "norm": (d,), "head": (config.vocab_size, d)}
    return found | {_TOP[name]: Expected(shape) for name, shape in top.items()}


def num_parameters(config: GptOssConfig) -> int:
    """How many numbers the model has, however its experts are written."""
    return sum(math.prod(one.shape) for one in expected_target_tensors(config, packed=False).values())


def source_of(path: str, config: GptOssConfig, weight_format: WeightFormat, *, packed_files: bool) -> Source:
    """Where the weight at `path`, such as `layers.0.experts.gate`, is in the files."""
    if not path.startswith("layers."):
        return _plain(path, _TOP[path], weight_format)
    _, number, field = path.split(".", 2)
    prefix = f"model.layers.{number}."
    if field in _LAYER:
        return _plain(field, prefix + _LAYER[field], weight_format)
    matrix = field.removeprefix("experts.").split(".")[0]
    if matrix.endswith("_bias"):
        return _bias(matrix.removesuffix("_bias"), prefix, config, weight_format)
    if weight_format.packed:
        if not packed_files:
            raise PipelineError(
                "the files hold no MXFP4 experts, which target.weights=mxfp4 wants; set target.weights=bf16"
            )
        return _packed(matrix, field.rpartition(".")[2], prefix, config)
    if packed_files:
        return _expanded(matrix, prefix, config, weight_format)
    return _floats(matrix, prefix, config, weight_format)


def _plain(field: str, name: str, weight_format: WeightFormat) -> Source:
    return transposed(name) if field in _KERNELS and not weight_format.transposed else unchanged(name)


def _bias(matrix: str, prefix: str, config: GptOssConfig, weight_format: WeightFormat) -> Source:
    name, place = f"{prefix}{_GATE_UP}_bias", PAIR[matrix]
    if is_fused(config, weight_format):
        return Source((name,), None, lambda biases, _: biases[:, place::2].reshape(-1))
    return Source(
        (name,),
        lambda index: (index[0], _file_rows(index[1], config)),
        lambda biases, index: _filled(biases[:, place::2], index[1], axis=1),
    )


def _floats(matrix: str, prefix: str, config: GptOssConfig, weight_format: WeightFormat) -> Source:
    """Experts as floats, of files with floats: gate and up [E, D, 2F], down [E, F, D]."""
    if matrix == "down":
        name = prefix + _DOWN
        if not is_fused(config, weight_format):
            return unchanged(name)
        return Source((name,), None, lambda down, _: _laid(down.reshape(-1, down.shape[-1]), weight_format))
    name, place = prefix + _GATE_UP, PAIR[matrix]
    if is_fused(config, weight_format):  # [D, E F]
        return Source(
            (name,),
            None,
            lambda both, _: _laid(np.moveaxis(both[..., place::2], 1, 0).reshape(both.shape[1], -1), weight_format),
        )
    return Source(
        (name,),
        lambda index: (index[0], index[2], _file_rows(index[1], config)),
        lambda both, _: np.swapaxes(both[..., place::2], 1, 2),
    )


def _expanded(matrix: str, prefix: str, config: GptOssConfig, weight_format: WeightFormat) -> Source:
    """Experts as floats, of packed files."""
    stem = prefix + (_DOWN if matrix == "down" else _GATE_UP)
    names = (f"{stem}_blocks", f"{stem}_scales")

    def floats(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """[E, F, D] of this matrix."""
        if matrix == "down":
            return np.swapaxes(mxfp4.dequantised(blocks, scales, weight_format.dtype), 1, 2)
        place = PAIR[matrix]
        return mxfp4.dequantised(blocks[:, place::2], scales[:, place::2], weight_format.dtype)

    if is_fused(config, weight_format):

        def wide(blocks: np.ndarray, scales: np.ndarray, _: Index) -> np.ndarray:
            rows = floats(blocks, scales).reshape(-1, config.hidden_size)
            return _laid(rows if matrix == "down" else rows.T, weight_format)

        return Source(names, None, wide)

    def pick(index: Index) -> Index:
        if matrix == "down":
            return index[0], index[2], slice(index[1].start // BLOCK, index[1].stop // BLOCK)
        return index[0], _file_rows(index[1], config)

    return Source(names, pick, lambda blocks, scales, _: floats(blocks, scales))


def _packed(matrix: str, part: str, prefix: str, config: GptOssConfig) -> Source:
    """Words or scales of packed experts, [E, K, N] packed along K, of packed files, [E, N, K]."""
    stem = prefix + (_DOWN if matrix == "down" else _GATE_UP)
    each = mxfp4.ROWS_OF_WORD if part == "words" else BLOCK  # rows of K in one of ours
    last = (config.intermediate_size if matrix == "down" else config.hidden_size) // BLOCK

    def pick(index: Index) -> Index:
        groups = slice(*(min(edge * each // BLOCK, last) for edge in (index[1].start, index[1].stop)))
        return index[0], index[2] if matrix == "down" else _file_rows(index[2], config), groups

    def arrange(*given: np.ndarray | Index) -> np.ndarray:
        *found, index = given
        if matrix != "down":
            found = [array[:, PAIR[matrix] :: 2] for array in found]
        rows, width = (index[1].stop - index[1].start) * each, index[2].stop - index[2].start
        return (mxfp4.words_of if part == "words" else mxfp4.scales_of)(*found, rows, width)

    names = (f"{stem}_blocks", f"{stem}_scales") if part == "words" else (f"{stem}_scales",)
    return Source(names, pick, arrange)


def _file_rows(rows: slice, config: GptOssConfig) -> slice:
    """The file's rows of gate and up for rows of one of them; none for padding."""
    stop = min(2 * rows.stop, 2 * config.intermediate_size)
    return slice(min(2 * rows.start, stop), stop)


def _filled(array: np.ndarray, wanted: slice, axis: int) -> np.ndarray:
    """Zeros behind what there is, up to the length of `wanted`."""
    lacking = wanted.stop - wanted.start - array.shape[axis]
    if not lacking:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, lacking)
    return np.pad(array, widths)


def _laid(kernel: np.ndarray, weight_format: WeightFormat) -> np.ndarray:
    """A kernel [in, out] as weights of this form have it."""
    return kernel.T if weight_format.transposed else kernel


def to_files(leaves: Mapping[str, np.ndarray], config: GptOssConfig) -> dict[str, np.ndarray]:
    """The tensors of unpacked weights, `leaves` by path with kernels [in, out], as the files have them."""
    tensors: dict[str, np.ndarray] = {}
    halves: dict[str, dict[str, np.ndarray]] = {}
    for path, array in leaves.items():
        _, number, field = path.split(".", 2) if path.startswith("layers.") else ("", "", path)
        prefix = f"model.layers.{number}." if number else ""
        if field in _TOP or field in _LAYER:
            tensors[prefix + (_TOP | _LAYER)[field]] = array.T if field in _KERNELS else array
            continue
        matrix, _, bias = field.removeprefix("experts.").partition("_")
        if matrix == "down":
            tensors[prefix + _DOWN] = array.reshape(config.num_local_experts, -1, config.hidden_size)
        elif bias:
            halves.setdefault(f"{prefix}{_GATE_UP}_bias", {})[matrix] = array.reshape(config.num_local_experts, -1)
        else:  # [D, E F] of wide ones, [E, F, D] else; [E, D, F] in the file
            wide = array.ndim == 2
            columns = (
                np.moveaxis(array.reshape(len(array), config.num_local_experts, -1), 1, 0)
                if wide
                else (np.swapaxes(array, 1, 2))
            )
            halves.setdefault(prefix + _GATE_UP, {})[matrix] = columns
    for name, both in halves.items():
        pair = np.stack([both["gate"], both["up"]], axis=-1)
        tensors[name] = pair.reshape(*pair.shape[:-2], -1)
    return tensors
