"""Compiles this project's GPT-OSS for sglang-jax with a TPU's own compiler, for a slice that need not be there.

    sglang_jax_topology.py --config CONFIG.json --topology v6e:2x4 [--tokens-per-request 8]

One pass over 32 requests in pages of 64, as the engine decodes (1 token each) or verifies a block (8), the weights
and the key/value pages split over all chips. libtpu must be importable. Prints one JSON line: bytes per chip, and the
engine's kernels that are in the program.
"""

import argparse
import json
import os
import re

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from transformers import AutoConfig

REQUESTS, PAGE, PAGES_OF_REQUEST, POOL_PAGES = 32, 64, 64, 2048
LANES = 128  # of a TPU's registers, to which the engine pads heads


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", required=True)
    parser.add_argument("--topology", default="v6e:2x4")
    parser.add_argument("--tokens-per-request", type=int, default=1)
    arguments = parser.parse_args()
    devices = topologies.get_topology_desc(arguments.topology, platform="tpu").devices
    jax.devices = lambda *_: devices  # what the engine asks to choose its kernels' sizes
    jax.local_devices = jax.devices
    mesh = Mesh(np.array(devices).reshape(1, -1), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    print(json.dumps(compiled(AutoConfig.from_pretrained(arguments.config), mesh, arguments.tokens_per_request)))


def compiled(config, mesh, tokens_per_request):
    from gpt_oss_sglang_jax.model import GptOssForCausalLM
    from sgl_jax.srt.layers.attention.flashattention_backend import FlashAttention, FlashAttentionMetadata
    from sgl_jax.srt.layers.logits_processor import LogitsMetadata
    from sgl_jax.srt.mem_cache.memory_pool import MemoryPools
    from sgl_jax.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode

    def array(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    def integers(count):
        return array((count,), jnp.int32, "data")

    with jax.set_mesh(mesh):
        model = nnx.eval_shape(lambda: GptOssForCausalLM(config, mesh, jnp.bfloat16))
    model.set_dflash_layers_to_capture([1, 6, 11, 16, 21])
    definition, state = nnx.split(model)
    heads, width = config.num_key_value_heads, -(-config.head_dim // LANES) * LANES
    buffers = [
        array((POOL_PAGES, PAGE, heads, 2, width), jnp.bfloat16, "data", None, "tensor", None, None)
        for _ in range(config.num_hidden_layers)
    ]
    backend = FlashAttention(config.num_attention_heads, heads, config.head_dim, page_size=PAGE, mesh=mesh)
    backend.forward_metadata = FlashAttentionMetadata(
        cu_q_lens=integers(REQUESTS + 1),
        cu_kv_lens=integers(REQUESTS + 1),
        page_indices=integers(REQUESTS * PAGES_OF_REQUEST),
        seq_lens=integers(REQUESTS),
        distribution=integers(3),
    )
    mode = ForwardMode.DECODE if tokens_per_request == 1 else ForwardMode.TARGET_VERIFY
    tokens = REQUESTS * tokens_per_request
    batch = ForwardBatch(
        bid=0,
        forward_mode=mode,
        batch_size=REQUESTS,
        input_ids=integers(tokens),
        req_pool_indices=integers(REQUESTS),
        seq_lens=integers(REQUESTS),
        out_cache_loc=integers(tokens),
        positions=integers(tokens),
        attn_backend=backend,
        capture_hidden_mode=CaptureHiddenMode.FULL,
    )
    metadata = LogitsMetadata(forward_mode=mode, capture_hidden_mode=CaptureHiddenMode.FULL)

    class Pool:
        """The one method of the engine's pool that a pass calls."""

        def __init__(self, layers):
            self.layers = layers

        def get_fused_kv_buffer(self, layer):
            return self.layers[layer]

    def run(leaves, batch, layers, metadata):
        model = nnx.merge(definition, leaves)
        output, caches, _, _ = model(batch, MemoryPools(token_to_kv_pool=Pool(layers)), metadata)
        return output, caches

    with jax.set_mesh(mesh):
        lowered = (
            jax.jit(run, donate_argnums=2).trace(state, batch, buffers, metadata).lower(lowering_platforms=("tpu",))
        )
        program = lowered.compile()
    memory = program.memory_analysis()
    text = program.as_text()
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "kernels": sorted(set(re.findall(r"\b(RPA[a-z]|gmm_v\d)\b", text))),
        "chips": mesh.size,
    }


if __name__ == "__main__":
    main()
