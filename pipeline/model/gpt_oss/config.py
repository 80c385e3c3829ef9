"""The sizes of a GPT-OSS model, read from and written to its `config.json`."""

import dataclasses
import math
from typing import Any

from pipeline.errors import PipelineError
from pipeline.model.gpt_oss import quantization
from pipeline.model.layers.config_values import is_number, is_whole
from pipeline.model.layers.rope import Rope

KINDS = {"sliding_attention": True, "full_attention": False}  # of a layer, and whether its attention is limited
_ORIGINAL = {  # keys of OpenAI's own config.json, as its `original/` folder has it
    "num_local_experts": "num_experts",
    "num_experts_per_tok": "experts_per_token",
}
_PLAIN = {"hidden_act": "silu", "attention_bias": True}


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
    def from_hf(cls, config: dict[str, Any], file: Any = "config.json") -> "GptOssConfig":
        """Reads an HF `config.json`, or the one of OpenAI's own layout.

        Raises PipelineError that names the file and everything in it that is missing or not supported.
        """
        config = _as_hf(config)
        wrong = [
            f"{key}: found {config.get(key)!r}, wanted {value!r}"
            for key, value in {"model_type": "gpt_oss", **_PLAIN}.items()
            if config.get(key, value) != value or (key == "model_type" and key not in config)
        ]
        wrong += quantization.problems(config)
        sizes = [field.name for field in dataclasses.fields(cls) if field.type is int]
        numbers = {field.name: field.default for field in dataclasses.fields(cls) if field.type is float}
        values: dict[str, Any] = {key: config.get(key) for key in sizes}
        values |= {key: default if config.get(key) is None else config[key] for key, default in numbers.items()}
        wrong += [f"{key}: missing" for key, value in values.items() if value is None]
        wrong += _misfits(values, sizes)
        rope = None
        try:
            rope = Rope.from_hf(config)
        except PipelineError as error:
            wrong.append(str(error))
        kinds = config.get("layer_types")
        if not wrong:
            wrong = _contradictions(values) + _unknown_layers(kinds, values["num_hidden_layers"])
        if wrong or rope is None:
            raise PipelineError(f"{file} is not a GPT-OSS model that can be run:\n  " + "\n  ".join(wrong))
        kinds = kinds or (list(KINDS) * values["num_hidden_layers"])[: values["num_hidden_layers"]]
        return cls(**values, sliding=tuple(KINDS[kind] for kind in kinds), rope=rope)

    def to_hf(self) -> dict[str, Any]:
        """Returns the `config.json` that transformers 4 and 5 read back as this model."""
        values = dataclasses.asdict(self)
        del values["sliding"], values["rope"]
        return {
            "architectures": ["GptOssForCausalLM"],
            "model_type": "gpt_oss",
            **values,
            "layer_types": ["sliding_attention" if sliding else "full_attention" for sliding in self.sliding],
            **self.rope.to_hf_spellings(),
            **_PLAIN,
            "tie_word_embeddings": False,
        }


def is_tied(config: dict[str, Any]) -> bool:
    """Returns whether the head of the model beside this `config.json` is its embedding."""
    return config.get("tie_word_embeddings") is True


def is_original(config: dict[str, Any]) -> bool:
    """Returns whether a `config.json` is of OpenAI's own layout, which has no model type."""
    return "model_type" not in config and set(_ORIGINAL.values()) <= config.keys()


def _as_hf(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a config with the keys of HF; OpenAI's own is described in gpt-oss's `torch/model.py`, `ModelConfig`."""
    if not is_original(config):
        return config
    initial, factor = config.get("initial_context_length", 4096), config.get("rope_scaling_factor", 32.0)
    return {
        **config,
        "model_type": "gpt_oss",
        **{ours: config[theirs] for ours, theirs in _ORIGINAL.items()},
        "max_position_embeddings": config.get("max_position_embeddings", round(initial * factor)),
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": factor,
            "beta_fast": config.get("rope_ntk_beta", 32.0),
            "beta_slow": config.get("rope_ntk_alpha", 1.0),
            "truncate": False,
            "original_max_position_embeddings": initial,
        },
    }


def _misfits(values: dict[str, Any], sizes: list[str]) -> list[str]:
    """Returns the values that are no numbers of the kind that is wanted."""
    wrong = []
    for key, value in values.items():
        if value is None:
            continue
        if key in sizes:
            fits, wanted = is_whole(value) and value > 0, "a positive whole number"
        else:
            fits, wanted = is_number(value) and 0 < value < math.inf, "a positive number"
        if not fits:
            wrong.append(f"{key}: found {value!r}, wanted {wanted}")
    return wrong


def _contradictions(values: dict[str, Any]) -> list[str]:
    """Returns the sizes that no model can have together."""
    heads, groups = values["num_attention_heads"], values["num_key_value_heads"]
    experts, used = values["num_local_experts"], values["num_experts_per_tok"]
    wrong = []
    if heads % groups:
        wrong.append(f"num_attention_heads: found {heads}, wanted a multiple of num_key_value_heads ({groups})")
    if used > experts:
        wrong.append(f"num_experts_per_tok: found {used}, wanted at most num_local_experts ({experts})")
    if values["head_dim"] % 2:
        wrong.append(f"head_dim: found {values['head_dim']}, wanted an even number, as rotary embedding needs it")
    return wrong


def _unknown_layers(kinds: Any, num_layers: int) -> list[str]:
    """Returns what is wrong with `layer_types`; without it sliding and full layers alternate."""
    if kinds is None or kinds == []:
        return []
    if not isinstance(kinds, list):
        return [f"layer_types: found {kinds!r}, wanted a list of {' and '.join(KINDS)}"]
    unknown = sorted({str(kind) for kind in kinds if kind not in list(KINDS)})
    wrong = [f"layer_types: found {', '.join(unknown)}, wanted {' and '.join(KINDS)} alone"] if unknown else []
    if len(kinds) != num_layers:
        wrong.append(f"layer_types: found {len(kinds)} kinds, wanted one for each of {num_layers} layers")
    return wrong


def is_packed(config: dict[str, Any]) -> bool:
    """Returns whether this `config.json` says that the experts are MXFP4; the tensors decide where there are any."""
    return quantization.method_of(config) == "mxfp4" or is_original(config)
