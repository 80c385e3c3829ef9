"""Attention of tokens over each other by maintained kernels: JAX's splash attention on a TPU, cuDNN's on a GPU.

Both return the values and the logarithm of the softmax's sum, from which the union with other keys and with GPT-OSS's
sinks follows exactly (attention.py, whose XLA path is the reference of both).
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float

TILE = 128  # splash attention takes rows in multiples of it
MAX_BLOCK = 512  # rows and keys that it holds at a time, at most


def splash_takes(length: int) -> bool:
    """Returns whether splash attention runs rows of this length."""
    return length % TILE == 0


def on_tpu(
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B T G H"],
    values: Float[Array, "B T G H"],
    window: int | None,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Returns values [B, T, N, H] and log-sums [B, T, N], float32, of causal attention.

    With a `window`, a position sees as many positions, itself included.
    """
    batch, length, num_heads, width = queries.shape
    groups = keys.shape[2]
    heads = num_heads // groups
    shape = (length, length)
    mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    block = next(size for size in (MAX_BLOCK, MAX_BLOCK // 2, TILE) if length % size == 0)
    attend = splash.make_splash_mqa_single_device(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(block_q=block, block_kv=block, block_kv_compute=block),
        save_residuals=True,
        interpret=interpret,
    )
    scaled = (queries * width**-0.5).reshape(batch, length, groups, heads, width)
    by_head = jnp.transpose(scaled, (0, 2, 3, 1, 4))
    attended, (log_sum,) = jax.vmap(jax.vmap(attend))(by_head, jnp.swapaxes(keys, 1, 2), jnp.swapaxes(values, 1, 2))
    attended = jnp.transpose(attended, (0, 3, 1, 2, 4)).reshape(queries.shape)
    return attended.astype(jnp.float32), jnp.transpose(log_sum, (0, 3, 1, 2)).reshape(batch, length, num_heads)


def on_gpu(
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B T G H"],
    values: Float[Array, "B T G H"],
    window: int | None,
    *,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Returns what `on_tpu` returns; cuDNN takes bfloat16 alone."""
    attended, log_sum = jax.nn.dot_product_attention(
        queries,
        keys,
        values,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
        return_residual=True,
    )
    return attended.astype(jnp.float32), log_sum.astype(jnp.float32)
