"""Rebuilds GPT-OSS's tokenizer from a GGUF file: llama.cpp's kind "gpt2" with the pre-tokenizer "gpt-4o".

A GGUF has tokens, merges and which tokens are control tokens; how text is split before, only by name. The pattern is
that of o200k in tiktoken and in openai/gpt-oss-20b, and the official `tokenizer.json` comes out byte by byte. Where a
whole word is a token it is taken without merging, as tiktoken does; merges lead to the same token.
"""

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pipeline.errors import PipelineError
from pipeline.target.gguf_file import GgufFile

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's types of tokens
_WANTED = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-4o"}
_OFF = ("tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token", "tokenizer.ggml.add_space_prefix")
_TOKENS, _TYPES, _MERGES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges"
_TEMPLATE, _POSITIONS = "tokenizer.chat_template", "gpt-oss.context_length"
_NAMED = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
}
_ENDS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join(
    [
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


def tokenizer_of(file: GgufFile) -> PreTrainedTokenizerFast:
    """Returns the tokenizer with its chat template; raises PipelineError where the file's cannot be rebuilt exactly."""
    found = file.values([*_WANTED, _TOKENS, _TYPES, _MERGES, _TEMPLATE, _POSITIONS, _NAMED["eos_token"]])
    tokens, types = found[_TOKENS], found[_TYPES]
    wrong = [
        f"{key}: found {found[key]!r}, wanted {wanted!r}" for key, wanted in _WANTED.items() if found[key] != wanted
    ]
    wrong += [f"{key}: found True, wanted False" for key in _OFF if file.get(key, False)]
    wrong += [
        f"{key}: found a {type(found[key]).__name__}, wanted a {kind.__name__}"
        for key, kind in {_TOKENS: list, _TYPES: list, _MERGES: list, _TEMPLATE: str}.items()
        if not isinstance(found[key], kind)
    ]
    wrong = wrong or _problems(tokens, types) + _ids_beyond(file, len(tokens))
    if wrong:
        raise PipelineError(f"{file.path} has a tokenizer that cannot be rebuilt exactly:\n  " + "\n  ".join(wrong))
    named = {name: tokens[file.get(key)] for name, key in _NAMED.items() if file.get(key) is not None}
    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_level(file, tokens, types, [_pair(merge) for merge in found[_MERGES]]),
        **named,
        chat_template=found[_TEMPLATE],
        model_max_length=found[_POSITIONS],
        clean_up_tokenization_spaces=False,
    )


def generation_config_of(file: GgufFile) -> dict[str, Any]:
    """Returns what the file says of a `generation_config.json`: the tokens that begin, end and pad an answer."""
    ends = sorted({file.get(key) for key in _ENDS} - {None})
    begin, pad = (file.get(_NAMED[name]) for name in ("bos_token", "pad_token"))
    found = {"bos_token_id": begin, "eos_token_id": ends, "pad_token_id": pad}
    return {name: value for name, value in found.items() if value is not None}


def _problems(tokens: Sequence[str], types: Sequence[int]) -> list[str]:
    """Returns what these tokens have that a tokenizer of this kind has not."""
    if len(tokens) != len(types):
        return [f"{_TYPES}: found {len(types)}, wanted one for each of {len(tokens)} tokens"]
    used = [token for token, kind in zip(tokens, types, strict=True) if kind != UNUSED]
    letters = set(pre_tokenizers.ByteLevel.alphabet())
    normal = {token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    unused = [
        token
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind == UNUSED and token != f"[PAD{index}]"
    ]
    checks = {
        f"{_TOKENS}: found {len(used) - len(set(used))} token(s) twice, wanted each once": len(used) > len(set(used)),
        f"{_TOKENS}: found {len(letters & normal)} of the 256 bytes, wanted all": not letters <= normal,
        f"{_TOKENS}: found letters that no byte is written as, wanted bytes alone": not set("".join(normal)) <= letters,
        f"{_TOKENS}: found unused tokens such as {unused[:1]}, wanted [PAD] with their number": bool(unused),
    }
    unknown = sorted(set(types) - {NORMAL, CONTROL, USER_DEFINED, UNUSED})
    if unknown:
        checks[f"{_TYPES}: found {unknown}, wanted 1 (normal), 3 (control), 4 (user-defined) and 5 (unused)"] = True
    return [text for text, is_wrong in checks.items() if is_wrong]


def _ids_beyond(file: GgufFile, count: int) -> list[str]:
    return [
        f"{key}: found {file.get(key)}, wanted a token below {count}"
        for key in {*_NAMED.values(), *_ENDS}
        if file.get(key) is not None and not 0 <= file.get(key) < count
    ]


def _pair(merge: str) -> tuple[str, str]:
    first, _, second = merge.partition(" ")
    return first, second


def _byte_level(
    file: GgufFile, tokens: Sequence[str], types: Sequence[int], merges: list[tuple[str, str]]
) -> Tokenizer:
    added = {index: kind for index, kind in enumerate(types) if kind in (CONTROL, USER_DEFINED)}
    normal = {token: index for index, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind == NORMAL}
    if list(added) != list(range(len(normal), len(normal) + len(added))):  # else they get these ids behind the others
        normal |= {tokens[index]: index for index in added}
    try:
        model = models.BPE(normal, merges, ignore_merges=True)
    except Exception as error:  # the library raises no other class
        raise PipelineError(f"{file.path}: {_MERGES} do not belong to its tokens ({error})") from error
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    for index, kind in added.items():
        is_control = kind == CONTROL
        add = tokenizer.add_special_tokens if is_control else tokenizer.add_tokens
        add([AddedToken(tokens[index], special=is_control, normalized=False)])
    misplaced = [tokens[index] for index in added if tokenizer.token_to_id(tokens[index]) != index]
    if misplaced:
        raise PipelineError(f"{file.path}: {_TOKENS}: {misplaced[0]} does not get its number; wanted tokens in order")
    return tokenizer
