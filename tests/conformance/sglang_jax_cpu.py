"""Starts sglang-jax's server with GPT-OSS on a CPU: the engine's own program, but for kernels that need a TPU.

    sglang_jax_cpu.py --device cpu [the engine's other arguments]

Two kernels are written out in plain JAX here, ragged paged attention with its cache of pages and the writer of the
draft's cache; the attention backend that uses them is kept on a CPU. Nothing else of the engine is changed, and
SGLANG_CI_SMALL_KV_SIZE, its own variable, bounds both caches.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

MASKED = -1e30


def attend(queries, keys, values, cache, *metadata, causal=1, sm_scale=1.0, sliding_window=None, **options):
    """Writes the new keys and values to their pages and attends over the pages of each token's own sequence.

    queries [T, N, H], keys and values [T, G, H], cache [pages, page size, 2 G / packing, packing, H padded], with the
    key and the value of a head side by side. A sequence's tokens are the last ones of its `kv_lens` positions, and its
    pages begin at its `cu_kv_lens`. Returns [T, N, H] and the cache.
    """
    kv_lens, page_indices, cu_q_lens, cu_kv_lens, distribution, custom_mask, attention_sink = metadata
    assert custom_mask is None, "the chain of a drafted block needs no mask"
    assert options.get("soft_cap") is None
    num_tokens, num_heads, width = queries.shape
    groups, page_size, padded = keys.shape[1], cache.shape[1], cache.shape[-1]
    num_sequences = distribution[2]
    tokens = jnp.arange(num_tokens)
    of_token = jnp.clip(jnp.searchsorted(cu_q_lens, tokens, side="right") - 1, 0, len(kv_lens) - 1)
    is_token = tokens < cu_q_lens[num_sequences]
    q_lens = cu_q_lens[1:] - cu_q_lens[:-1]
    positions = kv_lens[of_token] - q_lens[of_token] + tokens - cu_q_lens[of_token]

    first_page = -(-cu_kv_lens[:-1] // page_size)
    page = page_indices[jnp.clip(first_page[of_token] + positions // page_size, 0, len(page_indices) - 1)]
    slot = jnp.where(is_token, page * page_size + positions % page_size, cache.shape[0] * page_size)
    both = jnp.concatenate([keys, values], axis=-1).reshape(num_tokens, 2 * groups, width)
    both = jnp.pad(both, [(0, 0), (0, 0), (0, padded - width)]).reshape(num_tokens, *cache.shape[2:])
    flat = cache.reshape(-1, *cache.shape[2:]).at[slot].set(both.astype(cache.dtype), mode="drop")

    entries = jnp.arange(len(page_indices))
    of_entry = jnp.clip(jnp.searchsorted(first_page, entries, side="right") - 1, 0, len(kv_lens) - 1)
    entry_positions = ((entries - first_page[of_entry]) * page_size)[:, None] + jnp.arange(page_size)
    slots = (page_indices[:, None] * page_size + jnp.arange(page_size)).reshape(-1)
    known = flat[slots].reshape(len(slots), groups, 2, padded)[..., :width].astype(jnp.float32)
    of_entry, entry_positions = jnp.repeat(of_entry, page_size), entry_positions.reshape(-1)

    seen = (of_entry == of_token[:, None]) & (entry_positions < kv_lens[of_token][:, None]) & is_token[:, None]
    if causal:
        seen &= entry_positions <= positions[:, None]
    if sliding_window:
        seen &= entry_positions > positions[:, None] - sliding_window
    grouped = queries.astype(jnp.float32).reshape(num_tokens, groups, -1, width) * sm_scale
    scores = jnp.einsum("tgrh,sgh->tgrs", grouped, known[:, :, 0])
    scores = jnp.where(seen[:, None, None], scores, MASKED).reshape(num_tokens, num_heads, -1)
    if attention_sink is not None:
        sinks = jnp.broadcast_to(attention_sink.astype(jnp.float32)[None, :, None], (num_tokens, num_heads, 1))
        scores = jnp.concatenate([scores, sinks], axis=-1)
    shares = jax.nn.softmax(scores, axis=-1)[..., : len(slots)].reshape(num_tokens, groups, -1, len(slots))
    outputs = jnp.einsum("tgrs,sgh->tgrh", shares, known[:, :, 1]).reshape(queries.shape)
    outputs = jnp.where(is_token[:, None, None], outputs, 0)
    return outputs.astype(queries.dtype), flat.reshape(cache.shape)


def write(fused_kv, loc, kv_cache, page_size, kv_partition_axis="tensor", data_partition_axis="data", mesh=None):
    """Writes tokens' keys and values [T, 1, ...] to their slots of the cache; a slot of -1 is no token's."""
    spec = P(data_partition_axis, None, kv_partition_axis, None, None)

    def scatter(new, slots, cache):
        flat = cache.reshape(-1, *cache.shape[2:])
        slots = jnp.where(slots < 0, len(flat), slots)
        return flat.at[slots].set(new[:, 0].astype(flat.dtype), mode="drop").reshape(cache.shape)

    run = jax.shard_map(
        scatter, mesh=mesh, in_specs=(spec, P(data_partition_axis), spec), out_specs=spec, check_vma=False
    )
    return run(fused_kv, loc, kv_cache)


def patch() -> None:
    """Puts both functions where the engine looks for its kernels."""
    from sgl_jax.srt.layers.attention import flashattention_backend
    from sgl_jax.srt.mem_cache import memory_pool
    from sgl_jax.srt.model_executor.model_runner import ModelRunner

    flashattention_backend.ragged_paged_attention_v3 = attend
    flashattention_backend.get_tuned_block_sizes_v3 = lambda *_, **__: None
    memory_pool.update_fused_kv_cache_vectorized = write
    choose = ModelRunner._get_attention_backend

    @functools.wraps(choose)
    def chosen(runner):
        device, runner.server_args.device = runner.server_args.device, "tpu"  # else it takes another backend
        try:
            return choose(runner)
        finally:
            runner.server_args.device = device

    ModelRunner._get_attention_backend = chosen


if __name__ in ("__main__", "__mp_main__"):  # the second in processes that the server spawns
    from gpt_oss_sglang_jax.register import register

    patch()
    register()

if __name__ == "__main__":
    from gpt_oss_sglang_jax.__main__ import main

    main()
