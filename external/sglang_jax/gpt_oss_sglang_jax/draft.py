"""The engine's DFlash draft, with the rotary positions of its configuration and with every tensor there."""

import jax.numpy as jnp
from sgl_jax.srt.configs.model_config import ModelConfig
from sgl_jax.srt.models.dflash import DFlashDraftModel as EngineDraft
from transformers import PretrainedConfig

from gpt_oss_sglang_jax.checkpoint import Checkpoint
from gpt_oss_sglang_jax.rope import rope_of


class DFlashDraftModel(EngineDraft):
    """The engine's own draft ignores YaRN, and goes on with random weights where a file lacks tensors."""

    def __init__(self, config: PretrainedConfig, mesh, dtype: jnp.dtype = jnp.bfloat16) -> None:
        super().__init__(config=config, mesh=mesh, dtype=dtype)
        for layer in self.model.layers:
            layer.self_attn.rotary_emb = rope_of(config, layer.self_attn.head_dim, dtype)

    def load_weights(self, model_config: ModelConfig) -> None:
        """Loads the draft; raises ValueError when a tensor is missing."""
        Checkpoint(model_config.model_path).require(self._create_weight_mappings())
        super().load_weights(model_config)
