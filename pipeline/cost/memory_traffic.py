"""How many bytes a step must at least read: once each weight that it needs, and the cached entries of every row."""

from pipeline.model.dflash.config import DFlashConfig
from pipeline.model.gpt_oss.config import GptOssConfig

PACKED_BYTES = 0.5 + 1 / 32  # of a value in MXFP4: half a byte, and a 32nd of its block's scale
FLOAT_BYTES = 2  # of a value in bfloat16


def experts_hit(config: GptOssConfig, num_tokens: int) -> float:
    """Returns how many of a layer's experts are chosen by any of the tokens, on average, if tokens choose at random."""
    share = config.num_experts_per_tok / config.num_local_experts
    return config.num_local_experts * (1 - (1 - share) ** num_tokens)


def target_bytes(config: GptOssConfig, num_rows: int, tokens_per_row: int, context: int, *, packed: bool) -> float:
    """Returns the bytes that one pass of the target over `tokens_per_row` tokens of each row reads.

    Everything is bfloat16, but experts are MXFP4 when `packed`. Each row has `context` cached tokens.
    """
    heads = (2 * config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    attention = heads * config.hidden_size * FLOAT_BYTES
    num_tokens = num_rows * tokens_per_row
    expert_bytes = 3 * config.hidden_size * config.intermediate_size * (PACKED_BYTES if packed else FLOAT_BYTES)
    experts = experts_hit(config, num_tokens) * expert_bytes
    router = config.hidden_size * config.num_local_experts * FLOAT_BYTES
    head = config.vocab_size * config.hidden_size * FLOAT_BYTES
    return (
        config.num_hidden_layers * (attention + experts + router) + head + target_cache_bytes(config, num_rows, context)
    )


def target_cache_bytes(config: GptOssConfig, num_rows: int, context: int) -> float:
    """Returns the bytes of keys and values of `context` tokens of each row, of which sliding layers see a window."""
    position_bytes = 2 * config.num_key_value_heads * config.head_dim * FLOAT_BYTES
    seen = sum(min(context, config.sliding_window) if sliding else context for sliding in config.sliding)
    return float(num_rows * seen * position_bytes)


def draft_bytes(config: DFlashConfig, num_rows: int, context: int) -> float:
    """Returns the bytes that one pass of the draft over a block of each row reads; bfloat16, with the target's head."""
    heads = (2 * config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    layer = config.hidden_size * (heads + 3 * config.intermediate_size)
    weights = config.num_hidden_layers * layer + config.feature_size * config.hidden_size
    head = config.vocab_size * config.hidden_size
    cached = num_rows * context * config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim
    return float((weights + head + cached) * FLOAT_BYTES)
