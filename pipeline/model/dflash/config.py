"""The DFlash draft: a small pre-norm decoder that denoises blocks over the target's features.

It has no embedding and no head of its own; both are the target's, frozen. Source: the `dflash` package's
DFlashDraftModel and ../shared/reference/dflash.md section 1; every layer is non-causal and unwindowed.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar, no_type_check

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from pipeline.model import attention, kv_cache
from pipeline.model.execution import PLAIN, Execution
from pipeline.model.kv_cache import KVCache, LayerCache
from pipeline.model.linear import Kernel, linear, linear_over_shards, random_kernel, rms_norm
from pipeline.model.rope import Rope, angles, rotate
from pipeline.model.sharding import ALONE, MODEL, Shards


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftConfig:
    """Sizes of a draft and what it must know of its target; hashable, for `jit`.

    `hidden_size` and `vocab_size` are the target's; `attention_bias` adds biases to all four projections.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope: Rope
    tapped_layers: tuple[int, ...]
    num_target_layers: int
    block_size: int
    mask_token_id: int
    rms_norm_eps: float = 1e-5
    attention_bias: bool = False
    max_position_embeddings: int = 131072

    @property
    def feature_size(self) -> int:
        """Width of one token's features: tapped layers times the target's width."""
        return len(self.tapped_layers) * self.hidden_size

    def architecture(self) -> dict[str, Any]:
        """The sizes, as the contract records them."""
        values = dataclasses.asdict(self)
        for elsewhere in ("rope", "tapped_layers", "block_size", "mask_token_id"):
            del values[elsewhere]
        return values


@no_type_check  # JAX rebuilds it around shapes, masks and gradients too
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DraftLayerWeights:
    """One draft layer; the biases are None unless the config has `attention_bias`."""

    input_norm: Float[Array, " D"]
    query: Kernel
    key: Kernel
    value: Kernel
    output: Kernel
    query_norm: Float[Array, " H"]
    key_norm: Float[Array, " H"]
    mlp_norm: Float[Array, " D"]
    gate: Kernel
    up: Kernel
    down: Kernel
    query_bias: Float[Array, " NH"] | None = None
    key_bias: Float[Array, " GH"] | None = None
    value_bias: Float[Array, " GH"] | None = None
    output_bias: Float[Array, " D"] | None = None


@no_type_check  # JAX rebuilds it around shapes, masks and gradients too
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DraftWeights:
    """The whole draft. `fuse` maps a token's L tapped features to the width of the draft."""

    fuse: Kernel
    context_norm: Float[Array, " D"]
    layers: tuple[DraftLayerWeights, ...]
    norm: Float[Array, " D"]


Node = TypeVar("Node", DraftWeights, DraftLayerWeights)
Opened = Callable[[Any], Any]  # from weights of a node as they lie to those that are computed with


def as_it_is(node: Node) -> Node:
    """The weights as they lie."""
    return node


def context(
    weights: DraftWeights,
    config: DraftConfig,
    features: Float[Array, "B T LD"],
    positions: Int[Array, "B T"],
    shards: Shards = ALONE,
    opened: Opened = as_it_is,
) -> KVCache:
    """Keys and values of every layer for the features of T tokens at their absolute positions.

    `opened` as in `denoise_blocks`.
    """
    weights = opened(weights)
    features = features.astype(weights.norm.dtype)
    if shards.split:  # a shard holds a part of the kernel's inputs
        local = config.feature_size // shards.model
        features = jax.lax.dynamic_slice_in_dim(features, shards.first(MODEL, local), local, axis=-1)
    fused = rms_norm(
        linear_over_shards(features, weights.fuse, shards=shards), weights.context_norm, config.rms_norm_eps
    )
    cos_sin = angles(config.rope, config.head_dim, positions)
    layers = [opened(layer) for layer in weights.layers]
    return KVCache(tuple(LayerCache(*_keys_values(fused, layer, config, cos_sin)) for layer in layers))


def denoise(
    weights: DraftWeights,
    config: DraftConfig,
    embeddings: Float[Array, "B K D"],
    start: Int[Array, " B"],
    context: KVCache,
    run: Execution = PLAIN,
) -> Float[Array, "B K D"]:
    """Final hidden states of one block per row, its first slot at position `start`, over the context before it.

    `embeddings` are the target's rows for [anchor, mask, ...]; the target's head turns the result into
    logits, slot k predicting the token at its own position.
    """

    def attend(index: int, queries: Array, keys: Array, values: Array) -> Array:
        before = attention.over_cache(queries, context.layers[index], start, None, None)
        return attention.union([before, attention.over_own(queries, keys, values, causal=False)])

    positions = start[:, None] + jnp.arange(embeddings.shape[1])
    return _layers(weights, config, embeddings, positions, attend, run.shards)


def denoise_blocks(
    weights: DraftWeights,
    config: DraftConfig,
    embeddings: Float[Array, "B A K D"],
    positions: Int[Array, "B A K"],
    context: KVCache,
    visible: Bool[Array, "B A T"],
    *,
    remat: bool = False,
    opened: Opened = as_it_is,
    num_devices: int = 1,
) -> Float[Array, "B A K D"]:
    """As `denoise` for A blocks per sequence, as in training, each over the part of the context visible to it.

    With `remat` a layer's inner values are made again in the backward pass instead of being kept. `opened` makes the
    weights that are computed with of those of a layer (or of the draft, its layers aside) as they lie, again in the
    backward pass with `remat`. `num_devices` share out the scores of attention.
    """

    def attend(index: int, queries: Array, keys: Array, values: Array) -> Array:
        cached = context.layers[index]
        return attention.block_attention(
            queries, cached.keys, cached.values, visible, keys, values, num_devices=num_devices
        )

    return _layers(weights, config, embeddings, positions, attend, ALONE, remat=remat, opened=opened)


def _layers(
    weights: DraftWeights,
    config: DraftConfig,
    embeddings: Float[Array, "*batch K D"],
    positions: Int[Array, "*batch K"],
    attend: Callable[[int, Array, Array, Array], Array],
    shards: Shards,
    *,
    remat: bool = False,
    opened: Opened = as_it_is,
) -> Float[Array, "*batch K D"]:
    """The decoder layers; `attend` takes a layer's number and its queries, keys and values [*batch, K, heads, H]."""
    cos_sin = angles(config.rope, config.head_dim, positions)
    hidden = embeddings.astype(weights.norm.dtype)

    def run(index: int, layer: DraftLayerWeights, hidden: Float[Array, "*batch K D"]) -> Float[Array, "*batch K D"]:
        layer = opened(layer)
        normed = rms_norm(hidden, layer.input_norm, config.rms_norm_eps)
        queries = linear(normed, layer.query, layer.query_bias)
        queries = queries.reshape(*normed.shape[:-1], -1, config.head_dim)  # on a shard: its heads
        queries = rotate(rms_norm(queries, layer.query_norm, config.rms_norm_eps), *cos_sin)
        keys, values = _keys_values(normed, layer, config, cos_sin)
        attended = attend(index, queries, keys, values).astype(hidden.dtype).reshape(*normed.shape[:-1], -1)
        hidden = hidden + linear_over_shards(attended, layer.output, layer.output_bias, shards)
        normed = rms_norm(hidden, layer.mlp_norm, config.rms_norm_eps)
        inner = jax.nn.silu(linear(normed, layer.gate)) * linear(normed, layer.up)
        return hidden + linear_over_shards(inner, layer.down, shards=shards)

    for index, layer in enumerate(weights.layers):
        step = functools.partial(run, index)
        hidden = (jax.checkpoint(step) if remat else step)(layer, hidden)
    return rms_norm(hidden, weights.norm, config.rms_norm_eps)


def empty_cache(config: DraftConfig, num_rows: int, num_positions: int, dtype: DTypeLike) -> KVCache:
    """A context cache for `num_rows` rows of `num_positions` positions."""
    slots = [attention.cache_positions(num_positions)] * config.num_hidden_layers
    return kv_cache.empty(slots, num_rows, config.num_key_value_heads, config.head_dim, dtype)


def extend(cache: KVCache, new: KVCache, start: Int[Array, " B"], rows: Int[Array, " B"] | None = None) -> KVCache:
    """Append the context of T tokens, the first at position `start` of each row; rows as in `kv_cache.write`."""
    return KVCache(
        tuple(
            kv_cache.write(layer, part.keys, part.values, start, rows)
            for layer, part in zip(cache.layers, new.layers, strict=True)
        )
    )


def _keys_values(
    inputs: Float[Array, "*batch D"], layer: DraftLayerWeights, config: DraftConfig, cos_sin: tuple[Array, Array]
) -> tuple[Float[Array, "*batch G H"], Float[Array, "*batch G H"]]:
    split = (*inputs.shape[:-1], -1, config.head_dim)
    keys = rms_norm(linear(inputs, layer.key, layer.key_bias).reshape(split), layer.key_norm, config.rms_norm_eps)
    return rotate(keys, *cos_sin), linear(inputs, layer.value, layer.value_bias).reshape(split)


def weight_shapes(config: DraftConfig, dtype: DTypeLike = jnp.float32) -> DraftWeights:
    """The shapes of a draft's weights; nothing is allocated."""
    return jax.eval_shape(lambda: random_weights(config, jax.random.key(0), dtype))


def random_weights(config: DraftConfig, key: Array, dtype: DTypeLike = jnp.float32) -> DraftWeights:
    """Weights to start training from: normal, 1/sqrt(fan in), norms one, biases zero."""
    d, f = config.hidden_size, config.intermediate_size
    nh, gh = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    depth_scale = (2 * config.num_hidden_layers) ** -0.5  # keeps the residual stream's size flat with depth

    def normal(key: Array, fan_in: int, fan_out: int, scale: float = 1.0) -> Kernel:
        return random_kernel(key, fan_in, fan_out, dtype, scale)

    def bias(width: int) -> Array | None:
        return jnp.zeros(width, dtype) if config.attention_bias else None

    def layer(key: Array) -> DraftLayerWeights:
        keys = jax.random.split(key, 7)
        return DraftLayerWeights(
            input_norm=jnp.ones(d, dtype),
            query=normal(keys[0], d, nh),
            key=normal(keys[1], d, gh),
            value=normal(keys[2], d, gh),
            output=normal(keys[3], nh, d, depth_scale),
            query_norm=jnp.ones(config.head_dim, dtype),
            key_norm=jnp.ones(config.head_dim, dtype),
            mlp_norm=jnp.ones(d, dtype),
            gate=normal(keys[4], d, f),
            up=normal(keys[5], d, f),
            down=normal(keys[6], f, d, depth_scale),
            query_bias=bias(nh),
            key_bias=bias(gh),
            value_bias=bias(gh),
            output_bias=bias(d),
        )

    keys = jax.random.split(key, config.num_hidden_layers + 1)
    return DraftWeights(
        fuse=normal(keys[0], config.feature_size, d),
        context_norm=jnp.ones(d, dtype),
        layers=tuple(layer(one) for one in keys[1:]),
        norm=jnp.ones(d, dtype),
    )
