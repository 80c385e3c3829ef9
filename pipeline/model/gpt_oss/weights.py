"""The weights of a GPT-OSS model in each weight format: their types, their shapes, and random ones."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pipeline.model.gpt_oss.config import GptOssConfig
from pipeline.model.gpt_oss.experts import ExpertsWeights, FusedExpertWeights
from pipeline.model.layers.linear import Matrix, is_stored_transposed, random_matrix
from pipeline.model.layers.mxfp4 import BLOCK, Packed, padded
from pipeline.model.layers.pytree import pytree_dataclass
from pipeline.model.parallel.shards import UNSHARDED, Shards

PACKED_ROWS = 128  # rows of a packed expert are padded to a multiple of a TPU's lanes
RANDOM_CODE_DEVIATION = 2.93  # standard deviation of uniformly drawn E2M1 codes


@dataclasses.dataclass(frozen=True)
class WeightFormat:
    """Holds the weight format: the precision, whether experts are packed as MXFP4, and for how many shards.

    bfloat16 matrices are stored transposed. Packed experts are padded so that every shard has whole blocks.
    """

    dtype: str = "float32"
    packed: bool = False
    shards: Shards = UNSHARDED

    @property
    def transposed(self) -> bool:
        """Whether matrices are stored [out, in], as in the files."""
        return is_stored_transposed(self.dtype)

    def packed_rows(self, intermediate_size: int) -> int:
        """Returns F of a packed expert, padding included."""
        unit = PACKED_ROWS * self.shards.tensor
        return -(-intermediate_size // unit) * unit


@pytree_dataclass()
class LayerWeights:
    """Holds the weights of one decoder layer."""

    input_norm: Float[Array, " D"]
    query: Matrix
    query_bias: Float[Array, " NH"]
    key: Matrix
    key_bias: Float[Array, " GH"]
    value: Matrix
    value_bias: Float[Array, " GH"]
    output: Matrix
    output_bias: Float[Array, " D"]
    sinks: Float[Array, " N"]
    experts_norm: Float[Array, " D"]
    experts: ExpertsWeights | FusedExpertWeights


@pytree_dataclass()
class GptOssWeights:
    """Holds all weights of the model. GPT-OSS does not tie `head` [D, V] and `embedding`."""

    embedding: Float[Array, "V D"]
    layers: tuple[LayerWeights, ...]
    norm: Float[Array, " D"]
    head: Matrix


def is_fused(config: GptOssConfig, weight_format: WeightFormat) -> bool:
    """Returns whether experts are held as one fused network: none is packed, and a token uses a quarter or more.

    Running all of them then costs less than choosing among them.
    """
    return not weight_format.packed and config.num_local_experts <= 4 * config.num_experts_per_tok


def random_weights(config: GptOssConfig, key: Array, weight_format: WeightFormat = WeightFormat()) -> GptOssWeights:
    """Returns weights to start training from: normal, 1/sqrt(fan in), norms one, biases and sinks zero."""
    d, dtype = config.hidden_size, weight_format.dtype
    nh, gh = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    depth_scale = (2 * config.num_hidden_layers) ** -0.5  # keeps the residual stream's size flat with depth

    def layer(key: Array) -> LayerWeights:
        keys = jax.random.split(key, 5)
        return LayerWeights(
            input_norm=jnp.ones(d, dtype),
            query=random_matrix(keys[0], d, nh, weight_format.dtype),
            query_bias=jnp.zeros(nh, dtype),
            key=random_matrix(keys[1], d, gh, weight_format.dtype),
            key_bias=jnp.zeros(gh, dtype),
            value=random_matrix(keys[2], d, gh, weight_format.dtype),
            value_bias=jnp.zeros(gh, dtype),
            output=random_matrix(keys[3], nh, d, weight_format.dtype, depth_scale),
            output_bias=jnp.zeros(d, dtype),
            sinks=jnp.zeros(config.num_attention_heads, dtype),
            experts_norm=jnp.ones(d, dtype),
            experts=_experts(keys[4], config, weight_format, depth_scale),
        )

    keys = jax.random.split(key, config.num_hidden_layers + 2)
    return GptOssWeights(
        embedding=_normal(keys[0], (config.vocab_size, d), d, dtype),
        layers=tuple(layer(layer_key) for layer_key in keys[2:]),
        norm=jnp.ones(d, dtype),
        head=random_matrix(keys[1], d, config.vocab_size, weight_format.dtype),
    )


def weight_shapes(config: GptOssConfig, weight_format: WeightFormat = WeightFormat()) -> GptOssWeights:
    """Returns the shapes of weights in this format; nothing is allocated."""
    return jax.eval_shape(lambda: random_weights(config, jax.random.key(0), weight_format))


def _normal(key: Array, shape: tuple[int, ...], fan_in: int, dtype: DTypeLike, scale: float = 1.0) -> Array:
    return (scale * fan_in**-0.5 * jax.random.normal(key, shape)).astype(dtype)


def _experts(
    key: Array, config: GptOssConfig, weight_format: WeightFormat, depth_scale: float
) -> ExpertsWeights | FusedExpertWeights:
    d, f, e = config.hidden_size, config.intermediate_size, config.num_local_experts
    keys, dtype = jax.random.split(key, 4), weight_format.dtype
    common: dict[str, Any] = {
        "router": random_matrix(keys[0], d, e, dtype),
        "router_bias": jnp.zeros(e, dtype),
        "down_bias": jnp.zeros((e, d), dtype),
    }

    def biases(*shape: int) -> dict[str, Array]:  # one array each: donated buffers must differ
        return {name: jnp.zeros(shape, dtype) for name in ("gate_bias", "up_bias")}

    gate, up, down = keys[1:]
    if weight_format.packed:
        rows = weight_format.packed_rows(f)
        return ExpertsWeights(
            **common,
            **biases(e, rows),
            gate=_packed(gate, (e, padded(d), rows), d),
            up=_packed(up, (e, padded(d), rows), d),
            down=_packed(down, (e, rows, d), f, depth_scale),
        )
    if is_fused(config, weight_format):
        return FusedExpertWeights(
            **common,
            **biases(e * f),
            gate=random_matrix(gate, d, e * f, dtype),
            up=random_matrix(up, d, e * f, dtype),
            # a token sums over the rows of its own experts, not of all
            down=random_matrix(down, e * f, d, dtype, depth_scale * e**0.5),
        )
    return ExpertsWeights(
        **common,
        **biases(e, f),
        gate=_normal(gate, (e, f, d), d, dtype),
        up=_normal(up, (e, f, d), d, dtype),
        down=_normal(down, (e, f, d), f, dtype, depth_scale),
    )


def _packed(key: Array, shape: tuple[int, int, int], fan_in: int, scale: float = 1.0) -> Packed:
    """Returns random codes of matrices [E, K, N] under one scale, of about the deviation that `_normal` has."""
    exponent = jnp.round(jnp.log2(scale * fan_in**-0.5 / RANDOM_CODE_DEVIATION))
    num_experts, summed, width = shape
    words = jax.lax.bitcast_convert_type(jax.random.bits(key, (num_experts, summed // 8, width), jnp.uint32), jnp.int32)
    return Packed(words, jnp.full((num_experts, summed // BLOCK, width), exponent + 127).astype(jnp.uint8))
