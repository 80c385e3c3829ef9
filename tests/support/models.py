"""Configs of tiny targets and drafts for tests, as HF dictionaries; all sizes of one config are distinct."""

YARN = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 8.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 32,
}
TARGET = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "vocab_size": 98,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 5,
    "num_experts_per_tok": 3,
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "rope_parameters": YARN,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "attention_bias": True,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
ROUNDED_YARN = {**YARN, "truncate": True, "factor": 4.0}
WIDE_TARGET = {  # many experts for few tokens, three query heads a group, a deeper stack, YaRN rounded
    **TARGET,
    "vocab_size": 131,
    "hidden_size": 60,
    "intermediate_size": 28,
    "num_hidden_layers": 5,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "num_local_experts": 33,
    "num_experts_per_tok": 4,
    "sliding_window": 11,
    "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention", "full_attention"],
    "rope_parameters": ROUNDED_YARN,
}
LEGACY_TARGET = {  # the published spelling: rope_theta beside rope_scaling
    **{key: value for key, value in TARGET.items() if key != "rope_parameters"},
    "rope_theta": 150000.0,
    "rope_scaling": {key: value for key, value in YARN.items() if key != "rope_theta"},
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
}
PLAIN_ROPE_TARGET = {**TARGET, "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}}
PACKED_TARGET = {**TARGET, "hidden_size": 128, "intermediate_size": 96}  # MXFP4 packs 32 of either
WIDE_PACKED_TARGET = {
    **WIDE_TARGET,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
}
SPLIT_TARGET = {  # every mesh of eight devices divides its heads, experts, rows and vocabulary
    **TARGET,
    "vocab_size": 120,
    "hidden_size": 56,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 10,
    "num_local_experts": 16,
    "num_experts_per_tok": 3,
    "layer_types": ["sliding_attention", "full_attention"],
}
SPLIT_WIDE_TARGET = {**SPLIT_TARGET, "num_local_experts": 8}
SPLIT_PACKED_TARGET = {**SPLIT_TARGET, "hidden_size": 64, "intermediate_size": 96}
