"""A tiny random GPT-OSS as an HF checkpoint and as llama.cpp's GGUF, written with the `gguf` package's own writer.

Names are those of its tensor map, MXFP4 is its quantisation: nothing here is the product's.
"""

import json
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from tests.oracles.harmony_assets import PATTERN

CONTROL_TOKENS = (
    "<|startoftext|>",
    "<|endoftext|>",
    "<|reserved_200000|>",
    "<|return|>",
    "<|constrain|>",
    "<|channel|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|call|>",
)
TEMPLATE = (
    "{% for message in messages %}{{ '<|start|>' + message['role'] + '<|message|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
TEXT = (
    "The quick brown fox JUMPED over 1234567 lazy dogs; didn't he? We'LL see: naïve café, Straße, 東京, привет мир.\n"
    "def f(x):\n\treturn x**2 / 3.14  # two  spaces\r\n\r\n...!!! http://a.b/c\n"
)
ENDS = ("<|return|>", "<|call|>", "<|endoftext|>")
TOKENS, PADS = 330, 6  # llama.cpp fills the vocabulary up to the rows of the embedding
CONFIG = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "vocab_size": TOKENS + PADS,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 5,
    "num_experts_per_tok": 3,
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_theta": 150000.0,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 8.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 32,
    },
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "swiglu_limit": 7.0,
    "attention_bias": True,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
EXPERTS = ("gate_up_proj", "down_proj")
Tensors = dict[str, np.ndarray]


def checkpoint(seed: int = 0, config: dict[str, object] = CONFIG) -> Tensors:
    """Random tensors in HF's layout, all of them bfloat16, the experts as floats."""
    random = np.random.default_rng(seed)
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    v, d, f, n, g, h = (config[name] for name in sizes)
    e = config["num_local_experts"]

    def draw(*shape: int, center: float = 0.0) -> np.ndarray:
        spread = 0.2 if len(shape) == 1 else 2 / shape[-1] ** 0.5
        return (random.normal(size=shape) * spread + center).astype(ml_dtypes.bfloat16)

    tensors = {
        "model.embed_tokens.weight": draw(v, d) * np.asarray(4, ml_dtypes.bfloat16),
        "model.norm.weight": draw(d, center=1),
        "lm_head.weight": draw(v, d),
    }
    for index in range(config["num_hidden_layers"]):
        layer = {
            "input_layernorm.weight": draw(d, center=1),
            "post_attention_layernorm.weight": draw(d, center=1),
            "self_attn.sinks": draw(n),
            "mlp.router.weight": draw(e, d),
            "mlp.router.bias": draw(e),
            "mlp.experts.gate_up_proj": draw(e, d, 2 * f),
            "mlp.experts.gate_up_proj_bias": draw(e, 2 * f),
            "mlp.experts.down_proj": draw(e, f, d),
            "mlp.experts.down_proj_bias": draw(e, d),
        }
        for name, width in (("q", n * h), ("k", g * h), ("v", g * h)):
            layer |= {f"self_attn.{name}_proj.weight": draw(width, d), f"self_attn.{name}_proj.bias": draw(width)}
        layer |= {"self_attn.o_proj.weight": draw(d, n * h), "self_attn.o_proj.bias": draw(d)}
        tensors |= {f"model.layers.{index}.{name}": tensor for name, tensor in layer.items()}
    return tensors


def save(directory: Path, tensors: Tensors, config: dict[str, object] = CONFIG) -> Path:
    """Write tensors as the HF directory of a model."""
    directory.mkdir()
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def halves(name: str, tensor: np.ndarray) -> dict[str, np.ndarray]:
    """What llama.cpp makes of a tensor of experts, by the name that its map knows: gate and up apart, [out, in]."""
    stem, _, what = name.partition("experts.")
    if what.endswith("_bias"):
        parts = {"weight": tensor} if what.startswith("down") else {"gate": tensor[:, 0::2], "up": tensor[:, 1::2]}
    else:
        rows = np.swapaxes(tensor, 1, 2)
        parts = {"weight": rows} if what.startswith("down") else {"gate": rows[:, 0::2], "up": rows[:, 1::2]}
    end = "bias" if what.endswith("_bias") else "weight"
    matrix = {"weight": "down", "gate": "gate", "up": "up"}
    return {f"{stem}experts.{matrix[part]}_proj.{end}": array for part, array in parts.items()}


def quantised(tensors: Tensors, experts: Kind, others: Kind) -> Tensors:
    """The values in float32 that a file of these kinds holds, in HF's layout, by the package's own arithmetic."""

    def through(array: np.ndarray, kind: Kind) -> np.ndarray:
        return dequantize(quantize(np.ascontiguousarray(array, np.float32), kind), kind).reshape(array.shape)

    found = {}
    for name, tensor in tensors.items():
        if name.endswith(EXPERTS):
            rows = np.swapaxes(tensor, 1, 2)  # a row of gate and up stays whole
            found[name] = np.swapaxes(through(rows, experts), 1, 2)
        else:
            found[name] = through(tensor, others) if is_large(name, tensor) else tensor.astype(np.float32)
    return found


def is_large(name: str, tensor: np.ndarray) -> bool:
    """Whether llama.cpp quantises a tensor outside of the experts; the others it writes as float32."""
    return tensor.ndim > 1 and "router" not in name and not name.endswith("_bias")


def tokenizer() -> Tokenizer:
    """A small tokenizer of o200k's kind, control tokens last."""
    trained = Tokenizer(models.BPE(ignore_merges=True))
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PATTERN), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS - len(CONTROL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trained.train_from_iterator([TEXT], trainer)
    trained.add_special_tokens(list(CONTROL_TOKENS))
    assert trained.get_vocab_size() == TOKENS
    return trained


def add_tokenizer(writer: gguf.GGUFWriter, rows: int, fast: Tokenizer, template: str) -> None:
    """The tokens of a tokenizer as llama.cpp's converter writes them, filled up to the rows of the embedding."""
    control = {token.content for token in fast.get_added_tokens_decoder().values()}
    tokens = [fast.id_to_token(index) for index in range(fast.get_vocab_size())]
    types = [gguf.TokenType.CONTROL if token in control else gguf.TokenType.NORMAL for token in tokens]
    fill = range(len(tokens), rows)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-4o")
    writer.add_token_list(tokens + [f"[PAD{index}]" for index in fill])
    writer.add_token_types(types + [gguf.TokenType.UNUSED for _ in fill])
    merges = json.loads(fast.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(fast.token_to_id("<|startoftext|>"))
    writer.add_eos_token_id(fast.token_to_id("<|return|>"))
    writer.add_pad_token_id(fast.token_to_id("<|endoftext|>"))
    writer.add_chat_template(template)


def write(
    path: Path,
    tensors: Tensors,
    *,
    config: dict[str, object] = CONFIG,
    kinds: tuple[Kind, Kind] = (Kind.MXFP4, Kind.BF16),
    text: tuple[Tokenizer, str] | None = None,
    changes: dict[str, object] | None = None,
    replaced: dict[str, np.ndarray | None] | None = None,
    split_tensors: int = 0,
) -> Path:
    """Write the file, with these kinds of experts and of other matrices, and a tokenizer and a template.

    `changes` go over the metadata, `replaced` over the tensors by GGUF's name, as they are; None takes away. With
    `split_tensors` there are parts of so many tensors; the path of the first is returned.
    """
    writer = gguf.GGUFWriter(path, "gpt-oss", split_max_tensors=split_tensors)
    rope = config["rope_scaling"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_sliding_window(config["sliding_window"])
    writer.add_expert_feed_forward_length(config["intermediate_size"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    add_tokenizer(writer, config["vocab_size"], *(text or (tokenizer(), TEMPLATE)))
    for key, value in (changes or {}).items():
        writer.kv_data[0].pop(key, None)
        if value is not None:
            add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool}
            add.get(type(value), writer.add_array)(key, value)
    for name, array, kind in named(tensors, config, *kinds):
        if name in (replaced or {}):
            continue
        if kind is Kind.F32:
            writer.add_tensor(name, array.astype(np.float32))
        else:
            writer.add_tensor(name, quantize(np.ascontiguousarray(array, np.float32), kind), raw_dtype=kind)
    for name, array in (replaced or {}).items():
        if array is not None:
            writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if not split_tensors else min(path.parent.glob(f"{path.stem}-*.gguf"))


def named(
    tensors: Tensors, config: dict[str, object], experts: Kind, others: Kind
) -> list[tuple[str, np.ndarray, Kind]]:
    """The tensors by the names that the package's map gives them, each with the kind that it is stored in."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT_OSS, config["num_hidden_layers"])
    found = []
    for name, tensor in tensors.items():
        if ".experts." in name:
            kind = Kind.F32 if name.endswith("_bias") else experts
            parts = halves(name, tensor)
        elif name.endswith(".sinks"):
            kind, parts = Kind.F32, {f"{name}.weight": tensor}
        else:
            kind, parts = others if is_large(name, tensor) else Kind.F32, {name: tensor}
        for part, array in parts.items():
            mapped = names.get_name(part, try_suffixes=(".weight", ".bias"))
            assert mapped is not None, part
            found.append((mapped, array, kind))
    return found
