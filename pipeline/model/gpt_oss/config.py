"""The sizes of a GPT-OSS model, read from and written to its `config.json`."""

import dataclasses
from typing import Any

from pipeline.errors import PipelineError
from pipeline.model.layers.rope import Rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class GptOssConfig:
    """Holds the sizes of a GPT-OSS model; hashable, so that it can be a static argument of `jit`.

    `sliding` states for each layer whether its attention is limited to `sliding_window` positions.
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
        """Reads an HF `config.json`. Raises PipelineError that names everything that is missing or not supported."""
        wanted = {
            "model_type": "gpt_oss",
            "hidden_act": "silu",
            "attention_bias": True,
            "tie_word_embeddings": False,
        }
        wrong = [
            f"{key}: found {config.get(key)!r}, wanted {value!r}"
            for key, value in wanted.items()
            if config.get(key, value) != value or (key == "model_type" and key not in config)
        ]
        quantized = config.get("quantization_config")
        if quantized is not None and not is_packed(config):
            wrong.append(f"quantization_config: found {quantized}, wanted quant_method mxfp4 or none")
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
        """Returns the `config.json` that transformers reads back as this model."""
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


def is_packed(config: dict[str, Any]) -> bool:
    """Returns whether the files beside this `config.json` hold the experts as MXFP4, as OpenAI publishes them."""
    return (config.get("quantization_config") or {}).get("quant_method") == "mxfp4"
