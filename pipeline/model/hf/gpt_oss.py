"""Where the weights of a GPT-OSS model are in HF's files, and how they are stored there.

Linear layers are [out, in] in the files. The columns of experts' gate and up are interleaved, [.., gate 0, up 0,
gate 1, ..]; floats are [E, D, 2F] and [E, F, D], packed experts have the axes swapped: blocks of 16 bytes for 32
neighbours along the summed axis, [E, 2F, D/32, 16] and [E, D, F/32, 16], and a byte of scale for each block.
Source: transformers GptOssForCausalLM and its MXFP4 quantizer; github.com/openai/gpt-oss, model card section 2.
"""

import math
from collections.abc import Mapping

import numpy as np

from pipeline.errors import PipelineError
from pipeline.model.gpt_oss.config import GptOssConfig
from pipeline.model.gpt_oss.weights import WeightFormat, is_fused
from pipeline.model.hf.safetensors_files import BYTE_KINDS, Expected, Index
from pipeline.model.hf.tensor_source import Source, transposed, unchanged
from pipeline.model.layers import mxfp4
from pipeline.model.layers.mxfp4 import BLOCK

PAIR = {"gate": 0, "up": 1}  # the index of a column in a pair of neighbours
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
_MATRICES = {"head", "query", "key", "value", "output", "experts.router"}
_GATE_UP, _DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


def expected_target_tensors(config: GptOssConfig, *, packed: bool) -> dict[str, Expected]:
    """Returns every tensor that the files of this model hold, the experts `packed` as MXFP4 or not."""
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
    tensors = {
        f"model.layers.{index}.{name}": Expected(shape)
        for index in range(config.num_hidden_layers)
        for name, shape in layer.items()
    }
    if packed:
        bytes_of_layer = {
            f"{_GATE_UP}_blocks": (e, 2 * f, d // BLOCK, BLOCK // 2),
            f"{_GATE_UP}_scales": (e, 2 * f, d // BLOCK),
            f"{_DOWN}_blocks": (e, d, f // BLOCK, BLOCK // 2),
            f"{_DOWN}_scales": (e, d, f // BLOCK),
        }
        tensors |= {
            f"model.layers.{index}.{name}": Expected(shape, BYTE_KINDS)
            for index in range(config.num_hidden_layers)
            for name, shape in bytes_of_layer.items()
        }
    top = {"embedding": (config.vocab_size, d), "norm": (d,), "head": (config.vocab_size, d)}
    return tensors | {_TOP[name]: Expected(shape) for name, shape in top.items()}


def num_parameters(config: GptOssConfig) -> int:
    """Returns how many numbers the model has, whether its files are packed or not."""
    return sum(math.prod(tensor.shape) for tensor in expected_target_tensors(config, packed=False).values())


def source_of(path: str, config: GptOssConfig, weight_format: WeightFormat, *, packed_files: bool) -> Source:
    """Returns where the weight at `path`, such as `layers.0.experts.gate`, is in the files.

    Raises PipelineError when packed experts are wanted of files that hold floats.
    """
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
    return transposed(name) if field in _MATRICES and not weight_format.transposed else unchanged(name)


def _bias(matrix: str, prefix: str, config: GptOssConfig, weight_format: WeightFormat) -> Source:
    name, in_pair = f"{prefix}{_GATE_UP}_bias", PAIR[matrix]
    if is_fused(config, weight_format):
        return Source((name,), None, lambda biases, _: biases[:, in_pair::2].reshape(-1))
    return Source(
        (name,),
        lambda index: (index[0], _file_rows(index[1], config)),
        lambda biases, index: _filled(biases[:, in_pair::2], index[1], axis=1),
    )


def _floats(matrix: str, prefix: str, config: GptOssConfig, weight_format: WeightFormat) -> Source:
    """Returns the source of float experts in float files: gate and up [E, D, 2F], down [E, F, D]."""
    if matrix == "down":
        name = prefix + _DOWN
        if not is_fused(config, weight_format):
            return unchanged(name)
        return Source((name,), None, lambda down, _: _stored(down.reshape(-1, down.shape[-1]), weight_format))
    name, in_pair = prefix + _GATE_UP, PAIR[matrix]
    if is_fused(config, weight_format):  # [D, E F]
        return Source(
            (name,),
            None,
            lambda both, _: _stored(np.moveaxis(both[..., in_pair::2], 1, 0).reshape(both.shape[1], -1), weight_format),
        )
    return Source(
        (name,),
        lambda index: (index[0], index[2], _file_rows(index[1], config)),
        lambda both, _: np.swapaxes(both[..., in_pair::2], 1, 2),
    )


def _expanded(matrix: str, prefix: str, config: GptOssConfig, weight_format: WeightFormat) -> Source:
    """Returns the source of float experts in packed files."""
    stem = prefix + (_DOWN if matrix == "down" else _GATE_UP)
    names = (f"{stem}_blocks", f"{stem}_scales")

    def floats(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """Returns this matrix of every expert, [E, F, D]."""
        if matrix == "down":
            return np.swapaxes(mxfp4.dequantised(blocks, scales, weight_format.dtype), 1, 2)
        in_pair = PAIR[matrix]
        return mxfp4.dequantised(blocks[:, in_pair::2], scales[:, in_pair::2], weight_format.dtype)

    if is_fused(config, weight_format):

        def fused(blocks: np.ndarray, scales: np.ndarray, _: Index) -> np.ndarray:
            rows = floats(blocks, scales).reshape(-1, config.hidden_size)
            return _stored(rows if matrix == "down" else rows.T, weight_format)

        return Source(names, None, fused)

    def pick(index: Index) -> Index:
        if matrix == "down":
            return index[0], index[2], slice(index[1].start // BLOCK, index[1].stop // BLOCK)
        return index[0], _file_rows(index[1], config)

    return Source(names, pick, lambda blocks, scales, _: floats(blocks, scales))


def _packed(matrix: str, part: str, prefix: str, config: GptOssConfig) -> Source:
    """Returns the source of words or scales of packed experts, [E, K, N] packed along K, in packed files, [E, N, K]."""
    stem = prefix + (_DOWN if matrix == "down" else _GATE_UP)
    rows_each = mxfp4.ROWS_OF_WORD if part == "words" else BLOCK  # rows of K in a word or of a scale
    last = (config.intermediate_size if matrix == "down" else config.hidden_size) // BLOCK

    def pick(index: Index) -> Index:
        groups = slice(*(min(edge * rows_each // BLOCK, last) for edge in (index[1].start, index[1].stop)))
        return index[0], index[2] if matrix == "down" else _file_rows(index[2], config), groups

    def columns(array: np.ndarray) -> np.ndarray:
        return array if matrix == "down" else array[:, PAIR[matrix] :: 2]

    def size(index: Index) -> tuple[int, int]:
        return (index[1].stop - index[1].start) * rows_each, index[2].stop - index[2].start

    def words(blocks: np.ndarray, scales: np.ndarray, index: Index) -> np.ndarray:
        return mxfp4.words_of(columns(blocks), columns(scales), *size(index))

    def scales_alone(scales: np.ndarray, index: Index) -> np.ndarray:
        return mxfp4.scales_of(columns(scales), *size(index))

    if part == "words":
        return Source((f"{stem}_blocks", f"{stem}_scales"), pick, words)
    return Source((f"{stem}_scales",), pick, scales_alone)


def _file_rows(rows: slice, config: GptOssConfig) -> slice:
    """Returns the file's rows of gate and up for rows of either of them; none for padding."""
    stop = min(2 * rows.stop, 2 * config.intermediate_size)
    return slice(min(2 * rows.start, stop), stop)


def _filled(array: np.ndarray, wanted: slice, axis: int) -> np.ndarray:
    """Returns an array with zeros behind it, up to the length of `wanted`."""
    lacking = wanted.stop - wanted.start - array.shape[axis]
    if not lacking:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, lacking)
    return np.pad(array, widths)


def _stored(matrix: np.ndarray, weight_format: WeightFormat) -> np.ndarray:
    """Returns a matrix [in, out] as this weight format stores it."""
    return matrix.T if weight_format.transposed else matrix


def to_files(leaves: Mapping[str, np.ndarray], config: GptOssConfig) -> dict[str, np.ndarray]:
    """Returns the tensors of a target's files; `leaves` are unpacked weights by path, with matrices [in, out]."""
    tensors: dict[str, np.ndarray] = {}
    halves: dict[str, dict[str, np.ndarray]] = {}
    for path, array in leaves.items():
        _, number, field = path.split(".", 2) if path.startswith("layers.") else ("", "", path)
        prefix = f"model.layers.{number}." if number else ""
        if field in _TOP or field in _LAYER:
            tensors[prefix + (_TOP | _LAYER)[field]] = array.T if field in _MATRICES else array
            continue
        matrix, _, bias = field.removeprefix("experts.").partition("_")
        if matrix == "down":
            tensors[prefix + _DOWN] = array.reshape(config.num_local_experts, -1, config.hidden_size)
        elif bias:
            halves.setdefault(f"{prefix}{_GATE_UP}_bias", {})[matrix] = array.reshape(config.num_local_experts, -1)
        else:  # [D, EF] of fused experts, [E, F, D] of others; [E, D, F] in the file
            if array.ndim == 2:
                columns = np.moveaxis(array.reshape(len(array), config.num_local_experts, -1), 1, 0)
            else:
                columns = np.swapaxes(array, 1, 2)
            halves.setdefault(prefix + _GATE_UP, {})[matrix] = columns
    for name, both in halves.items():
        pair = np.stack([both["gate"], both["up"]], axis=-1)
        tensors[name] = pair.reshape(*pair.shape[:-2], -1)
    return tensors
