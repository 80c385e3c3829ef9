"""Sizes of a DFlash draft and what it must know of its target."""

import dataclasses
from typing import Any

from pipeline.model.layers.rope import Rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class DFlashConfig:
    """Holds the sizes of a draft and what it must know of its target; hashable, for `jit`.

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
        """LD: the width of one token's features, tapped layers times the target's width."""
        return len(self.tapped_layers) * self.hidden_size

    def architecture(self) -> dict[str, Any]:
        """Returns the sizes as the contract records them."""
        values = dataclasses.asdict(self)
        for name in ("rope", "tapped_layers", "block_size", "mask_token_id"):  # other fields of the contract hold these
            del values[name]
        return values
