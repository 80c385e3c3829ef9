"""GPT-OSS: one forward function for prefill, decode, verify, capture and training."""

import dataclasses
from collections.abc import Sequence
from typing import no_type_check

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pipeline.model import attention, kv_cache
from pipeline.model.execution import PLAIN, Execution
from pipeline.model.experts import mixture
from pipeline.model.gpt_oss_config import GptOssConfig
from pipeline.model.gpt_oss_weights import GptOssWeights, LayerWeights
from pipeline.model.kv_cache import KVCache, LayerCache
from pipeline.model.linear import linear, linear_over_shards, product, rms_norm
from pipeline.model.rope import angles, rotate
from pipeline.model.sharding import MODEL, Shards


@no_type_check  # JAX rebuilds it around shapes, masks and gradients too
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """What one pass gives: final hidden states, tapped features side by side, and the cache written on."""

    hidden: Float[Array, "B T D"]
    features: Float[Array, "B T LD"]
    cache: KVCache | None


def empty_cache(config: GptOssConfig, num_rows: int, num_positions: int, dtype: DTypeLike, *, rollback: int) -> KVCache:
    """A cache for `num_rows` rows of `num_positions` positions, of which at most `rollback` may be taken back.

    Sliding layers hold their window and `rollback` positions, whatever `num_positions` is.
    """
    whole = attention.cache_positions(num_positions)
    slots = [min(config.sliding_window + rollback, whole) if sliding else whole for sliding in config.sliding]
    return kv_cache.empty(slots, num_rows, config.num_key_value_heads, config.head_dim, dtype)


def forward(
    weights: GptOssWeights,
    config: GptOssConfig,
    token_ids: Int[Array, "B T"],
    start: Int[Array, " B"],
    cache: KVCache | None,
    tapped_layers: Sequence[int] = (),
    *,
    rows: Int[Array, " B"] | None = None,
    num_tokens: Int[Array, " B"] | None = None,
    run: Execution = PLAIN,
) -> Output:
    """Run T tokens of each row, the first one at position `start`, over what the cache holds before them.

    Prefill, single steps, blocks to verify and full sequences are all this call. Without a cache the rows
    stand alone (start is then 0). `rows` are the cache's rows, None for all in order; a number past the last is
    not written. Features are the outputs of `tapped_layers` before the final norm (`hidden_states[i + 1]` in
    transformers), concatenated in the order given. Of a row padded on the right, `num_tokens` count.
    """
    positions = start[:, None] + jnp.arange(token_ids.shape[1])
    cos_sin = angles(config.rope, config.head_dim, positions)
    hidden = embed(weights, token_ids, run.shards)
    outputs, layers = [], []
    for index, layer in enumerate(weights.layers):
        window = config.sliding_window if config.sliding[index] else None
        cached = None if cache is None else cache.layers[index]
        attended, written = _attention(hidden, layer, config, cos_sin, window, start, rows, num_tokens, cached, run)
        hidden = hidden + attended
        normed = rms_norm(hidden, layer.experts_norm, config.rms_norm_eps)
        flat = normed.reshape(-1, config.hidden_size)
        mixed = mixture(flat, layer.experts, config.num_experts_per_tok, config.swiglu_limit, run)
        hidden = hidden + mixed.reshape(hidden.shape)
        outputs.append(hidden)
        layers.append(written)
    taps = [outputs[index] for index in tapped_layers]
    features = jnp.concatenate(taps, axis=-1) if taps else hidden[..., :0]
    normed = rms_norm(hidden, weights.norm, config.rms_norm_eps)
    return Output(normed, features, None if cache is None else KVCache(tuple(layers)))


def embed(weights: GptOssWeights, token_ids: Int[Array, "*batch"], shards: Shards) -> Float[Array, "*batch D"]:
    """The tokens' rows of the embedding, which may be split over the vocabulary."""
    if not shards.split:
        return weights.embedding[token_ids]
    num_local = weights.embedding.shape[0]
    local = token_ids - shards.first(MODEL, num_local)
    here = (local >= 0) & (local < num_local)
    found = weights.embedding[jnp.where(here, local, 0)]
    return shards.sum(jnp.where(here[..., None], found, 0))


def logits(weights: GptOssWeights, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
    """Next-token logits of final hidden states in float32; on a shard, of its part of the vocabulary."""
    return product(hidden, weights.head)


def next_tokens(weights: GptOssWeights, hidden: Float[Array, "*batch D"], shards: Shards) -> Int[Array, "*batch"]:
    """The most likely next token of each position."""
    return shards.argmax(logits(weights, hidden))


def _attention(
    hidden: Float[Array, "B T D"],
    layer: LayerWeights,
    config: GptOssConfig,
    cos_sin: tuple[Array, Array],
    window: int | None,
    start: Int[Array, " B"],
    rows: Int[Array, " B"] | None,
    num_tokens: Int[Array, " B"] | None,
    cached: LayerCache | None,
    run: Execution,
) -> tuple[Float[Array, "B T D"], LayerCache | None]:
    split = (*hidden.shape[:2], -1, config.head_dim)  # on a shard: its heads
    normed = rms_norm(hidden, layer.input_norm, config.rms_norm_eps)
    queries = rotate(linear(normed, layer.query, layer.query_bias).reshape(split), *cos_sin)
    keys = rotate(linear(normed, layer.key, layer.key_bias).reshape(split), *cos_sin)
    values = linear(normed, layer.value, layer.value_bias).reshape(split)
    parts = [attention.over_own(queries, keys, values, window, run=run)]
    if cached is not None:
        if window is None:
            before = after = kv_cache.write(cached, keys, values, start, rows)
        else:
            before, after = cached, kv_cache.write_ring(cached, keys, values, start, rows, num_tokens)
            if keys.shape[1] <= after.keys.shape[1] - window:
                before = after  # what is overwritten has left the window
        # read after it is written, a cache is written in place: XLA would copy one that it must keep for reading
        parts.append(attention.over_cache(queries, before, start, rows, window))
        cached = after
    attended = attention.union(parts, layer.sinks).astype(hidden.dtype).reshape(*hidden.shape[:2], -1)
    return linear_over_shards(attended, layer.output, layer.output_bias, run.shards), cached
