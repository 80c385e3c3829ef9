"""How many bytes a step must at least read, and how many operations its products take.

Each weight that it needs is read once, and the cached entries of every row.
"""

from pipeline.model.dflash.config import DFlashConfig
from pipeline.model.gpt_oss.config import GptOssConfig

PACKED_BYTES = 0.5 + 1 / 32  # of a value in MXFP4: half a byte, and a 32nd of its block's scale
FLOAT_BYTES = 2.0  # of a value in bfloat16


def experts_hit(config: GptOssConfig, num_tokens: float | int) -> float:
    """Returns how many of a layer's experts are chosen by any of the tokens, on average, if tokens choose at random."""
    share = config.num_experts_per_tok / config.num_local_experts
    return config.num_local_experts * (1 - (1 - share) ** num_tokens)


def expert_bytes(config: GptOssConfig, *, packed: bool, value_bytes: float = FLOAT_BYTES) -> float:
    """Returns the bytes of one expert of one layer: MXFP4 when `packed`, else `value_bytes` a value."""
    return 3 * config.hidden_size * config.intermediate_size * (PACKED_BYTES if packed else value_bytes)


def target_bytes(
    config: GptOssConfig,
    num_rows: int,
    tokens_per_row: int,
    context: int,
    *,
    packed: bool,
    value_bytes: float = FLOAT_BYTES,
) -> float:
    """Returns the bytes that one pass of the target over `tokens_per_row` tokens of each row reads.

    Everything has `value_bytes`, but experts are MXFP4 when `packed`. Each row has `context` cached tokens.
    """
    heads = (2 * config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    attention = heads * config.hidden_size * value_bytes
    num_tokens = num_rows * tokens_per_row
    experts = experts_hit(config, num_tokens) * expert_bytes(config, packed=packed, value_bytes=value_bytes)
    router = config.hidden_size * config.num_local_experts * value_bytes
    head = config.vocab_size * config.hidden_size * value_bytes
    cached = target_cache_bytes(config, num_rows, context, value_bytes)
    return config.num_hidden_layers * (attention + experts + router) + head + cached


def target_flops(config: GptOssConfig, num_tokens: int, context: int) -> float:
    """Returns the operations of the products of one pass over `num_tokens` tokens, two to a multiply-add.

    Each token sees `context` cached ones, or a window of them; its experts are those that it chooses.
    """
    heads = (2 * config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    experts = config.num_experts_per_tok * 3 * config.intermediate_size
    layer = config.hidden_size * (heads + experts + config.num_local_experts)
    seen = sum(min(context, config.sliding_window) if sliding else context for sliding in config.sliding)
    attention = 2 * config.num_attention_heads * config.head_dim * seen
    return 2.0 * num_tokens * (config.num_hidden_layers * layer + attention + config.vocab_size * config.hidden_size)


def draft_flops(config: DFlashConfig, num_rows: int, context: int) -> float:
    """Returns the operations of the products of one draft pass over a block of each row, and of its features."""
    heads = (2 * config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    layer = config.hidden_size * (heads + 3 * config.intermediate_size)
    attention = 2 * config.num_attention_heads * config.head_dim * (context + config.block_size)
    token = config.num_hidden_layers * (layer + attention) + config.hidden_size * config.vocab_size
    fused = config.feature_size * config.hidden_size
    return 2.0 * num_rows * config.block_size * (token + fused)


def target_cache_bytes(config: GptOssConfig, num_rows: int, context: int, value_bytes: float = FLOAT_BYTES) -> float:
    """Returns the bytes of keys and values of `context` tokens of each row, of which sliding layers see a window."""
    position_bytes = 2 * config.num_key_value_heads * config.head_dim * value_bytes
    seen = sum(min(context, config.sliding_window) if sliding else context for sliding in config.sliding)
    return float(num_rows * seen * position_bytes)


def draft_bytes(config: DFlashConfig, num_rows: int, context: int, value_bytes: float = FLOAT_BYTES) -> float:
    """Returns the bytes that one pass of the draft over a block of each row reads, with the target's head."""
    heads = (2 * config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    layer = config.hidden_size * (heads + 3 * config.intermediate_size)
    weights = config.num_hidden_layers * layer + config.feature_size * config.hidden_size
    head = config.vocab_size * config.hidden_size
    cached = num_rows * context * config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim
    return float((weights + head + cached) * value_bytes)
