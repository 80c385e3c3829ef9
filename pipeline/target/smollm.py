"""Reads SmolLM2's tokenizer from its GGUF file.

transformers reads tokenizers from GGUF files too, but only with torch, and with GPT-2's pre-tokenizer, which
treats a space and the digit after it as one word. SmolLM2 splits every digit off first (llama.cpp's "smollm").
"""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipeline.errors import PipelineError
from pipeline.target.gguf_file import GgufFile

CONTROL = 3  # llama.cpp's type for tokens that text never contains
_KINDS = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"}
_TOKENS, _TYPES, _MERGES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges"
_TEMPLATE, _POSITIONS = "tokenizer.chat_template", "llama.context_length"
_NAMED = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
}


def tokenizer_of(file: GgufFile) -> PreTrainedTokenizerFast:
    """Returns the tokenizer with its chat template; raises PipelineError when the file's is of another kind."""
    found = file.values([*_KINDS, _TOKENS, _TYPES, _MERGES, _TEMPLATE, _POSITIONS, *_NAMED.values()])
    wrong = [f"{key}: found {found[key]!r}, wanted {kind!r}" for key, kind in _KINDS.items() if found[key] != kind]
    if wrong:
        raise PipelineError(f"{file.path} has another tokenizer than SmolLM2:\n  " + "\n  ".join(wrong))
    tokens = found[_TOKENS]
    merges = [tuple(merge.split(" ")) for merge in found[_MERGES]]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),  # with GPT-2's pattern
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, found[_TYPES], strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{name: tokens[found[key]] for name, key in _NAMED.items()},
        chat_template=found[_TEMPLATE],
        model_max_length=found[_POSITIONS],
        clean_up_tokenization_spaces=False,
    )
