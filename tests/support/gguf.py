"""A tiny random Llama in a GGUF file, quantised as SmolLM2's is, with a tokenizer and a template like its own."""

import json
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf.quants import quantize
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from pipeline.prompts.everyday.requests import request

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<gh_stars>")
CHATML = (  # SmolLM2's, with another default system message
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are tiny.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCABULARY, WIDTH, MLP, LAYERS, HEADS, GROUPS, HEAD_WIDTH = 420, 96, 160, 3, 6, 2, 16
POSITIONS = 512


def vocabulary() -> tuple[list[str], list[str]]:
    """Tokens, the control tokens first, and merges, learned from everyday requests."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(CONTROL_TOKENS),
        show_progress=False,
    )
    tokenizer.train_from_iterator((request(0, index) for index in range(400)), trainer)
    tokens = [tokenizer.id_to_token(index) for index in range(VOCABULARY)]
    merges = [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    return tokens, merges


def write(
    path: Path,
    *,
    seed: int = 0,
    tied: bool = True,
    kernels: Kind = Kind.Q4_1,
    metadata: dict[str, object] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
) -> Path:
    """Write the file; `metadata` (strings) goes over what is written otherwise, `tensors` are added as they are."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_rope_freq_base(1e4)
    writer.add_rope_dimension_count(HEAD_WIDTH)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    tokens, merges = vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in CONTROL_TOKENS else 1 for token in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(CHATML)
    for key, value in (metadata or {}).items():
        writer.kv_data[0].pop(key, None)
        writer.add_string(key, value)
    random = np.random.default_rng(seed)

    def add(name: str, *shape: int, kind: Kind) -> None:
        spread = 0.2 if len(shape) == 1 else 2 / shape[-1] ** 0.5
        array = (random.normal(size=shape) * spread + (len(shape) == 1)).astype(np.float32)
        if kind is Kind.F32:
            writer.add_tensor(f"{name}.weight", array)
        else:
            writer.add_tensor(f"{name}.weight", quantize(array, kind), raw_dtype=kind)

    add("token_embd", VOCABULARY, WIDTH, kind=Kind.Q8_0)
    add("output_norm", WIDTH, kind=Kind.F32)
    if not tied:
        add("output", VOCABULARY, WIDTH, kind=Kind.Q8_0)
    for index in range(LAYERS):
        add(f"blk.{index}.attn_norm", WIDTH, kind=Kind.F32)
        add(f"blk.{index}.attn_q", HEADS * HEAD_WIDTH, WIDTH, kind=kernels)
        add(f"blk.{index}.attn_k", GROUPS * HEAD_WIDTH, WIDTH, kind=kernels)
        add(f"blk.{index}.attn_v", GROUPS * HEAD_WIDTH, WIDTH, kind=kernels)
        add(f"blk.{index}.attn_output", WIDTH, HEADS * HEAD_WIDTH, kind=kernels)
        add(f"blk.{index}.ffn_norm", WIDTH, kind=Kind.F32)
        add(f"blk.{index}.ffn_gate", MLP, WIDTH, kind=kernels)
        add(f"blk.{index}.ffn_up", MLP, WIDTH, kind=kernels)
        add(f"blk.{index}.ffn_down", WIDTH, MLP, kind=kernels)
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
