"""A small draft that was never trained, for any small target."""

import jax

from pipeline.model.dflash import weights as dflash_weights
from pipeline.model.dflash.config import DFlashConfig
from pipeline.model.dflash.model import DraftModel
from pipeline.model.gpt_oss.config import GptOssConfig
from pipeline.model.layers.rope import Rope


def random_draft(target: GptOssConfig) -> DraftModel:
    config = DFlashConfig(
        vocab_size=target.vocab_size,
        hidden_size=target.hidden_size,
        intermediate_size=56,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        rope=Rope(theta=1e6),
        tapped_layers=(0,),
        num_target_layers=target.num_hidden_layers,
        block_size=4,
        mask_token_id=7,
    )
    return DraftModel(config, dflash_weights.random_weights(config, jax.random.key(0)))
