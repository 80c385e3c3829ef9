"""Quantises the experts of a GPT-OSS checkpoint to MXFP4 as OpenAI publishes them, with NVIDIA's Model Optimizer.

The tensors `gate_up_proj` [E, D, 2F] and `down_proj` [E, F, D] become `_blocks` and `_scales` of their transposes,
everything else is copied; with --shards the tensors are spread over several files and an index.
"""

import argparse
import json
from pathlib import Path

import torch
from modelopt.torch.quantization.qtensor.mxfp4_tensor import MXFP4QTensor
from safetensors.torch import load_file, save_file

BLOCK = 32
EXPERTS = ("gate_up_proj", "down_proj")
QUANTIZATION = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shards", type=int, default=1)
    arguments = parser.parse_args()

    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(arguments.model / "model.safetensors").items():
        if name.endswith(EXPERTS):
            tensors |= packed(name, tensor)
        else:
            tensors[name] = tensor
    arguments.out.mkdir(parents=True, exist_ok=True)
    write(tensors, arguments.out, arguments.shards)
    config = json.loads((arguments.model / "config.json").read_text())
    (arguments.out / "config.json").write_text(json.dumps(config | {"quantization_config": QUANTIZATION}))


def packed(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Blocks [E, out, in/32, 16] and scales [E, out, in/32] of a tensor [E, in, out]."""
    rows = tensor.transpose(1, 2).contiguous()
    quantised, scales = MXFP4QTensor.quantize(rows, BLOCK)
    groups = (*rows.shape[:2], rows.shape[2] // BLOCK)
    return {
        f"{name}_blocks": quantised._quantized_data.reshape(*groups, BLOCK // 2).contiguous(),
        f"{name}_scales": scales.reshape(groups).contiguous(),
    }


def write(tensors: dict[str, torch.Tensor], directory: Path, shards: int) -> None:
    """One file, or `shards` of them with the index that transformers reads."""
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensor for place, (name, tensor) in enumerate(tensors.items()) if place % shards == number}
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


if __name__ == "__main__":
    main()
