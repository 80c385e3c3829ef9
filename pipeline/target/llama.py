"""Converts a Llama in a GGUF file to a model of the GPT-OSS architecture that computes the same.

A GPT-OSS layer can express Llama's: attention without sinks (their logits lie far below all others) and without
biases, and a mixture that uses all of its experts in equal parts, each of them a slice of Llama's MLP. GPT-OSS's
activation (up + 1) * gate * sigmoid(1.702 * gate) equals silu(gate) * up, scaled by 1 / 1.702, when the gate is
divided by 1.702 and 1 is subtracted from up; its clamp is set to a limit that no activation reaches.
Source of the names and of the order of q and k: llama.cpp, conversion of LlamaForCausalLM.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float

from pipeline.errors import PipelineError
from pipeline.model.gpt_oss.config import GptOssConfig
from pipeline.model.gpt_oss.experts import SWIGLU_ALPHA, FusedExpertWeights
from pipeline.model.gpt_oss.weights import GptOssWeights, LayerWeights
from pipeline.model.layers.rope import Rope
from pipeline.target.gguf_file import GgufFile

NUM_EXPERTS = 4
# NumPy arrays where JAX arrays are declared: the weights are saved, and nothing is computed with them
_model_weights: Callable[..., GptOssWeights] = GptOssWeights
_layer_weights: Callable[..., LayerWeights] = LayerWeights
_expert_weights: Callable[..., FusedExpertWeights] = FusedExpertWeights
NO_SINK = -1e4  # exp(-1e4 - anything attention sees) is 0 in float32
SWIGLU_LIMIT = 1000.0
_SIZES = {
    "vocab_size": "llama.vocab_size",
    "hidden_size": "llama.embedding_length",
    "mlp_size": "llama.feed_forward_length",
    "num_layers": "llama.block_count",
    "num_heads": "llama.attention.head_count",
    "num_groups": "llama.attention.head_count_kv",
    "head_dim": "llama.rope.dimension_count",
    "rope_theta": "llama.rope.freq_base",
    "eps": "llama.attention.layer_norm_rms_epsilon",
    "num_positions": "llama.context_length",
}


def config_of(file: GgufFile) -> GptOssConfig:
    """Returns the GPT-OSS config that computes what the file's Llama does; raises PipelineError for other models."""
    architecture = file.values(["general.architecture"])["general.architecture"]
    if architecture != "llama":
        raise PipelineError(f"{file.path} holds a model of architecture {architecture!r}; wanted a 'llama'")
    found = file.values(_SIZES.values())
    sizes: dict[str, Any] = {name: found[key] for name, key in _SIZES.items()}
    wrong = []
    if sizes["mlp_size"] % NUM_EXPERTS:
        wrong.append(f"{_SIZES['mlp_size']} is {sizes['mlp_size']}; wanted a multiple of {NUM_EXPERTS}, the experts")
    if sizes["head_dim"] * sizes["num_heads"] != sizes["hidden_size"]:
        wrong.append(f"{_SIZES['head_dim']} is {sizes['head_dim']}; wanted embedding_length / head_count")
    if wrong:
        raise PipelineError(f"{file.path} is no Llama that can be converted:\n  " + "\n  ".join(wrong))
    return GptOssConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["mlp_size"] // NUM_EXPERTS,
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_heads"],
        num_key_value_heads=sizes["num_groups"],
        head_dim=sizes["head_dim"],
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=NUM_EXPERTS,
        sliding_window=sizes["num_positions"],  # no layer uses it
        sliding=(False,) * sizes["num_layers"],
        rope=Rope(theta=float(sizes["rope_theta"])),
        max_position_embeddings=sizes["num_positions"],
        rms_norm_eps=float(str(np.float32(sizes["eps"]))),  # 1e-05, not the float32 next to it
        swiglu_limit=SWIGLU_LIMIT,
    )


def num_bytes(file: GgufFile, config: GptOssConfig) -> int:
    """Returns about how many bytes the converted weights take on disk: float32, with a separate head."""
    return 4 * (file.num_weights + config.vocab_size * config.hidden_size)


def weights_of(file: GgufFile, config: GptOssConfig, on_layer: Callable[[], None]) -> GptOssWeights:
    """Returns the weights as float32 in NumPy; `on_layer` is called after each layer.

    Raises PipelineError that names tensors which are missing, misshapen, or not those of a Llama of this config.
    """
    v, d = config.vocab_size, config.hidden_size
    top = {"token_embd.weight", "output_norm.weight", "output.weight"}
    known_layers = {
        f"blk.{index}.{name}.weight" for index in range(config.num_hidden_layers) for name in _LAYER_TENSORS
    }
    unknown = sorted(file.tensor_names - top - known_layers)
    if unknown:
        raise PipelineError(
            f"{file.path} has {len(unknown)} tensor(s) that a plain Llama lacks: {', '.join(unknown[:5])}; "
            "biases, RoPE factors and experts are not converted"
        )
    embedding = file.tensor("token_embd.weight", (v, d))
    head = file.tensor("output.weight", (v, d)) if "output.weight" in file.tensor_names else embedding
    layers = []
    for index in range(config.num_hidden_layers):
        layers.append(_layer(file, f"blk.{index}", config))
        on_layer()
    return _model_weights(embedding, tuple(layers), file.tensor("output_norm.weight", (d,)), head.T)


_LAYER_TENSORS = "attn_norm attn_q attn_k attn_v attn_output ffn_norm ffn_gate ffn_up ffn_down".split()


def _layer(file: GgufFile, prefix: str, config: GptOssConfig) -> LayerWeights:
    d, n, g, h = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
    f = config.intermediate_size * NUM_EXPERTS

    def read(name: str, *shape: int) -> np.ndarray:
        return file.tensor(f"{prefix}.{name}.weight", shape)

    def zeros(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.float32)

    return _layer_weights(
        input_norm=read("attn_norm", d),
        query=halves_apart(read("attn_q", n * h, d), n).T,
        query_bias=zeros(n * h),
        key=halves_apart(read("attn_k", g * h, d), g).T,
        key_bias=zeros(g * h),
        value=read("attn_v", g * h, d).T,
        value_bias=zeros(g * h),
        output=read("attn_output", d, n * h).T,
        output_bias=zeros(d),
        sinks=np.full(n, NO_SINK, np.float32),
        experts_norm=read("ffn_norm", d),
        experts=_experts(read("ffn_gate", f, d), read("ffn_up", f, d), read("ffn_down", d, f)),
    )


def halves_apart(matrix: Float[np.ndarray, "NH D"], num_heads: int) -> Float[np.ndarray, "NH D"]:
    """Returns the rows of q or k in rotate-half order; llama.cpp puts the two rows of a rotated pair side by side."""
    rows, width = matrix.shape
    pairs = matrix.reshape(num_heads, rows // num_heads // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(rows, width)


def _experts(
    gate: Float[np.ndarray, "EF D"], up: Float[np.ndarray, "EF D"], down: Float[np.ndarray, "D EF"]
) -> FusedExpertWeights:
    """Returns Llama's MLP as experts end to end, each with share 1 / E."""
    e, (width, d) = NUM_EXPERTS, gate.shape
    return _expert_weights(
        router=np.zeros((d, e), np.float32),
        router_bias=np.zeros(e, np.float32),
        gate=gate.T / np.float32(SWIGLU_ALPHA),
        gate_bias=np.zeros(width, np.float32),
        up=up.T,
        up_bias=np.full(width, -1, np.float32),
        down=down.T * np.float32(SWIGLU_ALPHA * e),
        down_bias=np.zeros((e, d), np.float32),
    )
