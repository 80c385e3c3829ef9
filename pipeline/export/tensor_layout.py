"""The layout that other runtimes expect of a draft, written out independently of the code that saves weights.

Source: docs/dflash.md#tensors.
"""

import json
import struct
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.model.dflash.config import DFlashConfig


def tensor_shapes(config: DFlashConfig) -> dict[str, list[int]]:
    """Returns name and shape, [out, in], of every tensor of an exported draft."""
    d, f = config.hidden_size, config.intermediate_size
    nh, gh = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes = {"fc.weight": [d, config.feature_size], "hidden_norm.weight": [d], "norm.weight": [d]}
    layer = {
        "input_layernorm.weight": [d],
        "post_attention_layernorm.weight": [d],
        "self_attn.q_proj.weight": [nh, d],
        "self_attn.k_proj.weight": [gh, d],
        "self_attn.v_proj.weight": [gh, d],
        "self_attn.o_proj.weight": [d, nh],
        "self_attn.q_norm.weight": [config.head_dim],
        "self_attn.k_norm.weight": [config.head_dim],
        "mlp.gate_proj.weight": [f, d],
        "mlp.up_proj.weight": [f, d],
        "mlp.down_proj.weight": [d, f],
    }
    if config.attention_bias:
        biases = {"q": nh, "k": gh, "v": gh, "o": d}
        layer |= {f"self_attn.{name}_proj.bias": [width] for name, width in biases.items()}
    for index in range(config.num_hidden_layers):
        shapes |= {f"layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes


def require_layout(file: Path, config: DFlashConfig, dtype: str) -> None:
    """Raises PipelineError naming every tensor of a safetensors file that other runtimes would not expect.

    The file's header (eight bytes of length, then JSON) is read without the library that wrote it. `dtype` is spelled
    as in the header (BF16, F32).
    """
    with open(file, "rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    found = {name: (entry["dtype"], entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    wanted = {name: (dtype, shape) for name, shape in tensor_shapes(config).items()}
    wrong = [
        f"{name}: found {found.get(name, 'nothing')}, wanted {wanted.get(name, 'nothing')}"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]
    if header.get("__metadata__") != {"format": "pt"}:
        wrong.append(f"metadata: found {header.get('__metadata__')}, wanted {{'format': 'pt'}}")
    if wrong:
        raise PipelineError(f"{file} is not laid out as a DFlash draft:\n  " + "\n  ".join(wrong))
