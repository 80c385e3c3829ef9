"""A tokenizer whose chat format is ChatML: bytes and control tokens, no more."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.gguf import CHATML

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<gh_stars>")


def chatml_tokenizer(**named: str) -> PreTrainedTokenizerFast:
    """`named` names its special tokens; by default `<|im_end|>` ends a turn."""
    spelled = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={text: index for index, text in enumerate(spelled)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in CONTROL_TOKENS])
    named = named or {"eos_token": "<|im_end|>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHATML, **named)
