"""GPT-OSS's attention: grouped queries with biases, a learned sink for each head, and a window in every other layer."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from sgl_jax.srt.layers.linear import LinearBase
from sgl_jax.srt.layers.radix_attention import RadixAttention

from gpt_oss_sglang_jax.checkpoint import Checkpoint
from gpt_oss_sglang_jax.rope import rope_of

HEADS = P("data", "tensor", None)
COLUMNS, ROWS = (None, "tensor"), ("tensor", None)


class GptOssAttention(nnx.Module):
    """Holds the attention of one layer. The engine's kernel takes sinks and window, and its pool keeps the keys."""

    def __init__(self, config, layer_id: int, mesh: Mesh, dtype: jnp.dtype) -> None:
        self._heads, self._groups, self._width = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        if self._groups % mesh.shape["tensor"]:
            raise ValueError(f"{self._groups} key/value heads cannot be split over {mesh.shape['tensor']} devices")
        hidden, wide, narrow = config.hidden_size, self._heads * self._width, self._groups * self._width
        self.q_proj = _linear(hidden, wide, COLUMNS, mesh, dtype)
        self.k_proj = _linear(hidden, narrow, COLUMNS, mesh, dtype)
        self.v_proj = _linear(hidden, narrow, COLUMNS, mesh, dtype)
        self.o_proj = _linear(wide, hidden, ROWS, mesh, dtype)
        self.sinks = nnx.Param(jnp.zeros((self._heads,), dtype, out_sharding=P("tensor")))
        self.rotary_emb = rope_of(config, self._width, dtype)
        is_sliding = config.layer_types[layer_id] == "sliding_attention"
        self.attn = RadixAttention(
            num_heads=self._heads,
            head_dim=self._width,
            scaling=self._width**-0.5,
            num_kv_heads=self._groups,
            layer_id=layer_id,
            sliding_window_size=config.sliding_window if is_sliding else 0,
        )

    def load(self, checkpoint: Checkpoint, prefix: str, put) -> None:
        """Reads the layer `prefix` (model.layers.N.self_attn); `put` fills a parameter from a NumPy array."""
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            linear = getattr(self, name)
            put(linear.weight, checkpoint.tensor(f"{prefix}.{name}.weight").T, P(*linear.kernel_axes))
            put(linear.bias, checkpoint.tensor(f"{prefix}.{name}.bias"), P(linear.kernel_axes[-1]))
        put(self.sinks, checkpoint.tensor(f"{prefix}.sinks"), P("tensor"))

    def __call__(self, positions, hidden, forward_batch, pool) -> tuple[jax.Array, jax.Array]:
        """Returns the layer's attention [tokens, D], and the engine's updated cache."""
        projections = ((self.q_proj, self._heads), (self.k_proj, self._groups), (self.v_proj, self._groups))
        queries, keys, values = (
            linear(hidden)[0].reshape(-1, count, self._width, out_sharding=HEADS) for linear, count in projections
        )
        queries, keys = self.rotary_emb(positions, queries, keys)
        attended, cache = self.attn(
            queries, keys, values, forward_batch, pool, attention_sink=self.sinks.value.astype(jnp.float32)
        )
        return self.o_proj(attended)[0], cache


def _linear(inputs: int, outputs: int, axes, mesh: Mesh, dtype: jnp.dtype) -> LinearBase:
    return LinearBase(
        input_size=inputs, output_size=outputs, use_bias=True, kernel_axes=axes, params_dtype=dtype, mesh=mesh
    )
