"""The arithmetic of a training step, counted from the shapes, for model FLOPs utilisation.

Only the multiply-adds of matrix products count, as two operations each; what `remat` computes a second time does not
(the convention of PaLM, arXiv 2204.02311, appendix B).
"""

from pipeline.model.dflash.config import DFlashConfig


def step_flops(
    config: DFlashConfig, *, num_sequences: float, num_positions: float, num_anchors: int, context_tokens: float
) -> float:
    """Returns the operations of one step: forward, and backward at twice that where weights are trained.

    A batch has `num_sequences` rows of `num_positions` tokens and of `num_anchors` blocks, which see `context_tokens`
    cached tokens each on average.
    """
    d, nh = config.hidden_size, config.num_attention_heads * config.head_dim
    gh = config.num_key_value_heads * config.head_dim
    layers, block_positions = config.num_hidden_layers, num_sequences * num_anchors * config.block_size
    tokens = num_sequences * num_positions
    context = tokens * (config.feature_size * d + layers * 2 * d * gh)
    layer = d * nh + 2 * d * gh + nh * d + 3 * d * config.intermediate_size
    attention = 2 * nh * (context_tokens + config.block_size)
    trained = context + block_positions * layers * (layer + attention)
    fused = tokens * config.feature_size * d  # nothing below the features is trained: one product less backward
    drafted = num_sequences * num_anchors * (config.block_size - 1)
    head = drafted * d * config.vocab_size  # frozen: only the product with its input's gradient
    return 2 * (3 * trained - fused + 2 * head)
