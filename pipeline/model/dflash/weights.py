"""The weights of a DFlash draft: their types, their shapes, and random ones."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pipeline.model.dflash.config import DFlashConfig
from pipeline.model.layers.linear import Matrix, random_matrix
from pipeline.model.layers.pytree import pytree_dataclass


@pytree_dataclass()
class DFlashLayerWeights:
    """Holds the weights of one draft layer; the biases are None unless the config has `attention_bias`."""

    input_norm: Float[Array, " D"]
    query: Matrix
    key: Matrix
    value: Matrix
    output: Matrix
    query_norm: Float[Array, " H"]
    key_norm: Float[Array, " H"]
    mlp_norm: Float[Array, " D"]
    gate: Matrix
    up: Matrix
    down: Matrix
    query_bias: Float[Array, " NH"] | None = None
    key_bias: Float[Array, " GH"] | None = None
    value_bias: Float[Array, " GH"] | None = None
    output_bias: Float[Array, " D"] | None = None


@pytree_dataclass()
class DFlashWeights:
    """Holds all weights of a draft. `fuse` [LD, D] maps a token's L tapped features to the width of the draft."""

    fuse: Matrix
    context_norm: Float[Array, " D"]
    layers: tuple[DFlashLayerWeights, ...]
    norm: Float[Array, " D"]


Node = TypeVar("Node", DFlashWeights, DFlashLayerWeights)

GatherWeights = Callable[[Any], Any]  # from the weights of a node as they are stored to those that are computed with


def no_gather(node: Node) -> Node:
    """Returns the weights as they are stored."""
    return node


def weight_shapes(config: DFlashConfig, dtype: DTypeLike = jnp.float32) -> DFlashWeights:
    """Returns the shapes of a draft's weights; nothing is allocated."""
    return jax.eval_shape(lambda: random_weights(config, jax.random.key(0), dtype))


def random_weights(config: DFlashConfig, key: Array, dtype: DTypeLike = jnp.float32) -> DFlashWeights:
    """Returns weights to start training from: normal, 1/sqrt(fan in), norms one, biases zero."""
    d, f = config.hidden_size, config.intermediate_size
    nh, gh = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    depth_scale = (2 * config.num_hidden_layers) ** -0.5  # keeps the residual stream's size flat with depth

    def normal(key: Array, fan_in: int, fan_out: int, scale: float = 1.0) -> Matrix:
        return random_matrix(key, fan_in, fan_out, dtype, scale)

    def bias(width: int) -> Array | None:
        return jnp.zeros(width, dtype) if config.attention_bias else None

    def layer(key: Array) -> DFlashLayerWeights:
        keys = jax.random.split(key, 7)
        return DFlashLayerWeights(
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
    return DFlashWeights(
        fuse=normal(keys[0], config.feature_size, d),
        context_norm=jnp.ones(d, dtype),
        layers=tuple(layer(layer_key) for layer_key in keys[1:]),
        norm=jnp.ones(d, dtype),
    )
