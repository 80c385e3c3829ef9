"""GPT-OSS as a model of sglang-jax: the class that the engine builds, loads and runs."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from sgl_jax.srt.configs.model_config import ModelConfig
from sgl_jax.srt.layers.embeddings import Embed, ParallelLMHead
from sgl_jax.srt.layers.layernorm import RMSNorm
from sgl_jax.srt.layers.logits_processor import LogitsProcessor
from transformers import PretrainedConfig

from gpt_oss_sglang_jax.attention import GptOssAttention
from gpt_oss_sglang_jax.checkpoint import Checkpoint, placed
from gpt_oss_sglang_jax.experts import GptOssExperts

log = logging.getLogger(__name__)

VOCABULARY = ("tensor", None)


class GptOssLayer(nnx.Module):
    """Holds one layer: attention and experts, each behind its norm."""

    def __init__(self, config: PretrainedConfig, layer_id: int, mesh: Mesh, dtype: jnp.dtype) -> None:
        self.input_layernorm = _norm(config, dtype)
        self.self_attn = GptOssAttention(config, layer_id, mesh, dtype)
        self.post_attention_layernorm = _norm(config, dtype)
        self.mlp = GptOssExperts(config, mesh, dtype)

    def __call__(self, positions, hidden, forward_batch, pool) -> tuple[jax.Array, jax.Array]:
        """Returns the layer's output [tokens, D] and the engine's updated cache."""
        attended, cache = self.self_attn(positions, self.input_layernorm(hidden), forward_batch, pool)
        hidden = hidden + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden)), cache


class GptOssModel(nnx.Module):
    """Holds the network between tokens and logits."""

    def __init__(self, config: PretrainedConfig, mesh: Mesh, dtype: jnp.dtype) -> None:
        self.embed_tokens = Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=dtype,
            param_dtype=dtype,
            kernel_axes=VOCABULARY,
            mesh=mesh,
        )
        self.layers = nnx.data([GptOssLayer(config, index, mesh, dtype) for index in range(config.num_hidden_layers)])
        self.norm = _norm(config, dtype)
        self.tapped: list[int] = []  # layers whose outputs a draft gets

    def __call__(self, forward_batch, pool):
        """Returns normed hidden states [tokens, D], the tapped layers' outputs, and every layer's updated cache."""
        hidden = self.embed_tokens(forward_batch.input_ids)
        caches, outputs = [], []
        for layer in self.layers:
            hidden, cache = layer(forward_batch.positions, hidden, forward_batch, pool)
            caches.append(cache)
            outputs.append(hidden)
        return self.norm(hidden), [outputs[index] for index in self.tapped], caches


class GptOssForCausalLM(nnx.Module):
    """The class of `architectures: ["GptOssForCausalLM"]`, with the methods that the engine calls."""

    def __init__(self, config: PretrainedConfig, mesh: Mesh, dtype: jnp.dtype = jnp.bfloat16) -> None:
        self.config, self.mesh, self.dtype = config, mesh, dtype
        self.model = GptOssModel(config, mesh, dtype)
        self.is_tied = bool(getattr(config, "tie_word_embeddings", False))
        if not self.is_tied:
            self.lm_head = ParallelLMHead(
                config.vocab_size, config.hidden_size, dtype=dtype, param_dtype=dtype, kernel_axes=VOCABULARY
            )
        self.logits_processor = LogitsProcessor(config.vocab_size, mesh=mesh)
        self.capture_aux_hidden_states = False

    def load_weights(self, model_config: ModelConfig) -> None:
        """Reads a checkpoint in Hugging Face's layout, bfloat16 or MXFP4; raises ValueError when it lacks a tensor."""
        checkpoint = Checkpoint(model_config.model_path)
        self._put(self.model.embed_tokens.embedding, checkpoint.tensor("model.embed_tokens.weight"), P(*VOCABULARY))
        self._put(self.model.norm.scale, checkpoint.tensor("model.norm.weight"), P(None))
        if not self.is_tied:
            self._put(self.lm_head.embedding, checkpoint.tensor("lm_head.weight"), P(*VOCABULARY))
        for index, layer in enumerate(self.model.layers):
            prefix = f"model.layers.{index}"
            layer.self_attn.load(checkpoint, f"{prefix}.self_attn", self._put)
            layer.mlp.load(checkpoint, f"{prefix}.mlp")
            for name in ("input_layernorm", "post_attention_layernorm"):
                self._put(getattr(layer, name).scale, checkpoint.tensor(f"{prefix}.{name}.weight"), P(None))
        log.info("GPT-OSS: %d layers loaded from %s", len(self.model.layers), model_config.model_path)

    def _put(self, parameter: nnx.Param, stored: np.ndarray, spec: P) -> None:
        if stored.shape != parameter.shape:
            raise ValueError(f"a tensor has shape {stored.shape} in the checkpoint and {parameter.shape} in the model")
        sharding = NamedSharding(self.mesh, spec)
        parameter.value = placed(stored.shape, np.dtype(self.dtype), sharding, lambda index: stored[index])

    def get_embed_and_head(self) -> tuple[jax.Array, jax.Array]:
        """Returns the embedding and the head, both [V, D], which the draft shares."""
        embedding = self.model.embed_tokens.embedding.value
        return embedding, embedding if self.is_tied else self.lm_head.embedding.value

    def set_dflash_layers_to_capture(self, layer_ids: list[int] | None) -> None:
        """Sets the layers whose outputs the draft gets; raises ValueError for ids that are not ascending layers."""
        count = len(self.model.layers)
        ids = list(layer_ids or [])
        if not ids or ids != sorted(set(ids)) or not 0 <= ids[0] <= ids[-1] < count:
            raise ValueError(f"the draft's target_layer_ids are {layer_ids}; wanted ascending ids of {count} layers")
        self.model.tapped, self.capture_aux_hidden_states = ids, True

    def __call__(self, forward_batch, memory_pools, logits_metadata):
        """Returns what the engine takes of a pass: logits, the updated caches, and two things that GPT-OSS has not."""
        hidden, tapped, caches = self.model(forward_batch, memory_pools.token_to_kv_pool)
        head = self.model.embed_tokens if self.is_tied else self.lm_head
        aux = tapped if self.capture_aux_hidden_states else None
        output = self.logits_processor(hidden, head, logits_metadata, aux_hidden_states=aux)
        return output, {"token_to_kv_pool": caches}, [], None


def _norm(config: PretrainedConfig, dtype: jnp.dtype) -> RMSNorm:
    return RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, param_dtype=dtype)
