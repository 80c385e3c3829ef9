"""Writes a checkpoint of the published layout at random, reads it, and prints what that took of the host's memory.

A program of its own, because the peak of a process's memory never falls. Prints one JSON line.
"""

import json
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from pipeline.model.gpt_oss.config import GptOssConfig, is_packed
from pipeline.model.gpt_oss.weights import WeightFormat
from pipeline.model.hf import gpt_oss as hf_gpt_oss
from pipeline.model.hf.directory import open_target, read_target

SHARD_BYTES = 2**28
RANK = 16


def write(directory: Path, hf: dict) -> int:
    """Shards of about SHARD_BYTES with their index; returns the bytes of all tensors."""
    random = np.random.default_rng(0)
    expected = hf_gpt_oss.expected_target_tensors(GptOssConfig.from_hf(hf), packed=is_packed(hf))
    shards, size = [{}], 0
    for name, wanted in expected.items():
        if "U8" in wanted.kinds:
            tensor = random.integers(100, 130, wanted.shape, dtype=np.uint8)
        else:
            tensor = random.standard_normal(wanted.shape, np.float32).astype(ml_dtypes.bfloat16)
        if sum(one.nbytes for one in shards[-1].values()) + tensor.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor
        size += tensor.nbytes
    weight_map = {}
    for number, tensors in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(hf))
    return size


def write_adapter(directory: Path, hf: dict) -> int:
    """A LoRA of every attention projection and of all experts, as PEFT stacks them; returns its bytes."""
    random, tensors = np.random.default_rng(1), {}
    config = GptOssConfig.from_hf(hf)
    width, inner, experts = config.hidden_size, config.intermediate_size, config.num_local_experts
    heads = {"q_proj": config.num_attention_heads, "v_proj": config.num_key_value_heads}

    def pair(module: str, inputs: int, outputs: int, rank: int) -> None:
        for side, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            name = f"base_model.model.model.layers.{module}.lora_{side}.weight"
            tensors[name] = random.normal(scale=0.01, size=shape).astype(np.float32)

    for layer in range(config.num_hidden_layers):
        for name, count in heads.items():
            pair(f"{layer}.self_attn.{name}", width, count * config.head_dim, RANK)
        pair(f"{layer}.mlp.experts", inner, width, RANK * experts)  # down_proj
        pair(f"{layer}.mlp.experts.base_layer", width, 2 * inner, RANK * experts)  # gate_up_proj
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return sum(tensor.nbytes for tensor in tensors.values())


def memory(name: str) -> int:
    """Bytes of this process, as the kernel counts them: VmRSS now, VmHWM at the most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def main() -> None:
    directory, hf, weight_format = Path(sys.argv[2]), json.loads(sys.argv[3]), json.loads(sys.argv[4])
    if sys.argv[1] == "write":
        print(json.dumps({"file_bytes": write(directory, hf)}))
        return
    adapter = Path(sys.argv[5]) if len(sys.argv) > 5 else None
    if adapter is not None:
        write_adapter(adapter, hf)
    jax.block_until_ready(jax.numpy.zeros(8))  # what a backend takes is not the loader's
    before = memory("VmRSS")
    opened = open_target(directory, adapter)
    target = jax.block_until_ready(read_target(opened, WeightFormat(**weight_format)))
    leaves = jax.tree.leaves(target)
    found = {
        "peak_bytes": memory("VmHWM") - before,
        "resident_bytes": sum(leaf.nbytes for leaf in leaves),
        "largest_bytes": max(leaf.nbytes for leaf in leaves),
        "bytes_per_parameter": _bytes_per_parameter(target),
    }
    print(json.dumps(found))


def _bytes_per_parameter(target) -> float:
    config = GptOssConfig.from_hf(json.loads(sys.argv[3]))
    shapes = [wanted.shape for wanted in hf_gpt_oss.expected_target_tensors(config, packed=False).values()]
    return sum(leaf.nbytes for leaf in jax.tree.leaves(target)) / sum(map(int, map(np.prod, shapes)))


if __name__ == "__main__":
    main()
