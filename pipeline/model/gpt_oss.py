"""GPT-OSS: config, weights and one forward function for prefill, decode, verify, capture and training."""

import dataclasses
from collections.abc import Sequence
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pipeline.artifacts import PipelineError
from pipeline.model import kv_cache
from pipeline.model.attention import causal_visible, sink_attention
from pipeline.model.experts import ExpertsWeights, mixture
from pipeline.model.kv_cache import KVCache, LayerCache
from pipeline.model.linear import einsum, linear, rms_norm
from pipeline.model.rope import Rope, angles, rotate


@dataclasses.dataclass(frozen=True, kw_only=True)
class GptOssConfig:
    """Sizes of a GPT-OSS model; hashable, so that it can be a static argument of `jit`.

    `sliding` tells of each layer whether its attention is limited to `sliding_window` positions.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_local_experts: int
    num_experts_per_tok: int
    sliding_window: int
    sliding: tuple[bool, ...]
    rope: Rope
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    swiglu_limit: float = 7.0

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "GptOssConfig":
        """Read an HF `config.json`. Raises PipelineError naming everything that is missing or not supported."""
        wanted = {
            "model_type": "gpt_oss",
            "hidden_act": "silu",
            "attention_bias": True,
            "tie_word_embeddings": False,
            "quantization_config": None,
        }
        wrong = [
            f"{key}: found {config.get(key)!r}, wanted {value!r}"
            for key, value in wanted.items()
            if config.get(key, value) != value or (key == "model_type" and key not in config)
        ]
        plain = [
            field.name
            for field in dataclasses.fields(cls)
            if field.default is dataclasses.MISSING and field.name not in ("sliding", "rope")
        ]
        wrong += [f"{key}: missing" for key in plain if config.get(key) is None]
        if wrong:
            raise PipelineError("config.json is not a GPT-OSS model that can be run:\n  " + "\n  ".join(wrong))
        num_layers = config["num_hidden_layers"]
        kinds = config.get("layer_types") or ["sliding_attention", "full_attention"] * num_layers
        return cls(
            **{key: config[key] for key in plain},
            sliding=tuple(kind == "sliding_attention" for kind in kinds[:num_layers]),
            rope=Rope.from_hf(config),
            rms_norm_eps=config.get("rms_norm_eps", 1e-5),
            swiglu_limit=config.get("swiglu_limit") or 7.0,
        )

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that transformers reads back as this model."""
        values = dataclasses.asdict(self)
        del values["sliding"], values["rope"]
        return {
            "architectures": ["GptOssForCausalLM"],
            "model_type": "gpt_oss",
            **values,
            "layer_types": ["sliding_attention" if sliding else "full_attention" for sliding in self.sliding],
            "rope_parameters": self.rope.to_hf(),
            "attention_bias": True,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
        }


@no_type_check  # JAX rebuilds it around shapes, masks and gradients too
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerWeights:
    """One decoder layer."""

    input_norm: Float[Array, " D"]
    query: Float[Array, "D NH"]
    query_bias: Float[Array, " NH"]
    key: Float[Array, "D GH"]
    key_bias: Float[Array, " GH"]
    value: Float[Array, "D GH"]
    value_bias: Float[Array, " GH"]
    output: Float[Array, "NH D"]
    output_bias: Float[Array, " D"]
    sinks: Float[Array, " N"]
    experts_norm: Float[Array, " D"]
    experts: ExpertsWeights


@no_type_check  # JAX rebuilds it around shapes, masks and gradients too
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GptOssWeights:
    """The whole model; `head` is not tied to `embedding`."""

    embedding: Float[Array, "V D"]
    layers: tuple[LayerWeights, ...]
    norm: Float[Array, " D"]
    head: Float[Array, "D V"]


@no_type_check  # JAX rebuilds it around shapes, masks and gradients too
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """What one pass gives: final hidden states, tapped features side by side, and the cache written on."""

    hidden: Float[Array, "B T D"]
    features: Float[Array, "B T LD"]
    cache: KVCache | None


def empty_cache(config: GptOssConfig, batch: int, num_positions: int, dtype: DTypeLike) -> KVCache:
    """A cache for `batch` rows of `num_positions` positions."""
    return kv_cache.empty(
        config.num_hidden_layers, batch, num_positions, config.num_key_value_heads, config.head_dim, dtype
    )


def forward(
    weights: GptOssWeights,
    config: GptOssConfig,
    token_ids: Int[Array, "B T"],
    start: Int[Array, " B"],
    cache: KVCache | None,
    tapped_layers: Sequence[int] = (),
) -> Output:
    """Run T tokens of each row, the first one at position `start`, over what the cache holds before them.

    Prefill, single steps, blocks to verify and full sequences are all this call. Without a cache the rows
    stand alone (start is then 0). Features are the outputs of `tapped_layers` before the final norm
    (`hidden_states[i + 1]` in transformers), concatenated in the order given. Rows padded on the right are
    fine: a pad's cache slots are overwritten before any query sees them.
    """
    positions = start[:, None] + jnp.arange(token_ids.shape[1])
    num_keys = token_ids.shape[1] if cache is None else cache.num_positions
    full = causal_visible(positions, num_keys, None)
    near = causal_visible(positions, num_keys, config.sliding_window)
    cos_sin = angles(config.rope, config.head_dim, positions)
    hidden = weights.embedding[token_ids]
    outputs, layers = [], []
    for index, layer in enumerate(weights.layers):
        visible = near if config.sliding[index] else full
        attended, written = _attention(
            hidden, layer, config, cos_sin, visible, start, None if cache is None else cache.layers[index]
        )
        hidden = hidden + attended
        normed = rms_norm(hidden, layer.experts_norm, config.rms_norm_eps)
        flat = normed.reshape(-1, config.hidden_size)
        mixed = mixture(flat, layer.experts, config.num_experts_per_tok, config.swiglu_limit)
        hidden = hidden + mixed.reshape(hidden.shape)
        outputs.append(hidden)
        layers.append(written)
    taps = [outputs[index] for index in tapped_layers]
    features = jnp.concatenate(taps, axis=-1) if taps else hidden[..., :0]
    normed = rms_norm(hidden, weights.norm, config.rms_norm_eps)
    return Output(normed, features, None if cache is None else KVCache(tuple(layers)))


def logits(weights: GptOssWeights, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
    """Next-token logits of final hidden states."""
    return einsum("...d,dv->...v", hidden, weights.head)


def _attention(
    hidden: Float[Array, "B T D"],
    layer: LayerWeights,
    config: GptOssConfig,
    cos_sin: tuple[Array, Array],
    visible: Array,
    start: Int[Array, " B"],
    cached: LayerCache | None,
) -> tuple[Float[Array, "B T D"], LayerCache | None]:
    split = (*hidden.shape[:2], -1, config.head_dim)
    normed = rms_norm(hidden, layer.input_norm, config.rms_norm_eps)
    queries = rotate(linear(normed, layer.query, layer.query_bias).reshape(split), *cos_sin)
    keys = rotate(linear(normed, layer.key, layer.key_bias).reshape(split), *cos_sin)
    values = linear(normed, layer.value, layer.value_bias).reshape(split)
    if cached is not None:
        cached = kv_cache.write(cached, keys, values, start)
        keys, values = cached.keys, cached.values
    attended = sink_attention(queries, keys, values, visible, layer.sinks)
    return linear(attended.reshape(*hidden.shape[:2], -1), layer.output, layer.output_bias), cached


def random_weights(config: GptOssConfig, key: Array, dtype: DTypeLike = jnp.float32) -> GptOssWeights:
    """Weights to start training from: normal, 1/sqrt(fan in), norms one, sinks zero."""
    d, f, e = config.hidden_size, config.intermediate_size, config.num_local_experts
    nh, gh = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    depth_scale = (2 * config.num_hidden_layers) ** -0.5  # keeps the residual stream's size flat with depth

    def normal(key: Array, *shape: int, fan_in: int, scale: float = 1.0) -> Array:
        return (scale * fan_in**-0.5 * jax.random.normal(key, shape)).astype(dtype)

    def layer(key: Array) -> LayerWeights:
        keys = jax.random.split(key, 7)
        return LayerWeights(
            input_norm=jnp.ones(d, dtype),
            query=normal(keys[0], d, nh, fan_in=d),
            query_bias=jnp.zeros(nh, dtype),
            key=normal(keys[1], d, gh, fan_in=d),
            key_bias=jnp.zeros(gh, dtype),
            value=normal(keys[2], d, gh, fan_in=d),
            value_bias=jnp.zeros(gh, dtype),
            output=normal(keys[3], nh, d, fan_in=nh, scale=depth_scale),
            output_bias=jnp.zeros(d, dtype),
            sinks=jnp.zeros(config.num_attention_heads, dtype),
            experts_norm=jnp.ones(d, dtype),
            experts=ExpertsWeights(
                router=normal(keys[4], d, e, fan_in=d),
                router_bias=jnp.zeros(e, dtype),
                gate_up=normal(keys[5], e, d, 2, f, fan_in=d),
                gate_up_bias=jnp.zeros((e, 2, f), dtype),
                down=normal(keys[6], e, f, d, fan_in=f, scale=depth_scale),
                down_bias=jnp.zeros((e, d), dtype),
            ),
        )

    keys = jax.random.split(key, config.num_hidden_layers + 2)
    return GptOssWeights(
        embedding=normal(keys[0], config.vocab_size, d, fan_in=d),
        layers=tuple(layer(one) for one in keys[2:]),
        norm=jnp.ones(d, dtype),
        head=normal(keys[1], d, config.vocab_size, fan_in=d),
    )
