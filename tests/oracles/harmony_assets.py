"""GPT-OSS's tokenizer and chat template, from packages that carry them: every file is the official one, by its sha256.

The ranks of o200k_base are in llama-index-core's wheel, the template is in trl's; tokenizer.json is built from the
ranks, as openai/gpt-oss-20b has it. `make oracle-env` runs this once.
"""

import argparse
import base64
import hashlib
import json
import zipfile
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

RANKS, TEMPLATE, TOKENIZER = "o200k_base.tiktoken", "chat_template.jinja", "tokenizer.json"
MEMBERS = {
    RANKS: ("llama_index_core", "llama_index/core/_static/tiktoken_cache/fb374d419588a4632f3f557e76b4b70aebbca790"),
    TEMPLATE: ("trl", "trl/chat_templates/gptoss.jinja"),
}
SHA256 = {
    RANKS: "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
    TEMPLATE: "a4c9919cbbd4acdd51ccffe22da049264b1b73e59055fa58811a99efbd7c8146",
    TOKENIZER: "0614fe83cadab421296e664e1f48f4261fa8fef6e03e63bb75c20f38e37d07d3",
}
FIRST_CONTROL_TOKEN, NUM_CONTROL_TOKENS = 199998, 21
CONTROL_TOKENS = {
    199998: "<|startoftext|>",
    199999: "<|endoftext|>",
    200002: "<|return|>",
    200003: "<|constrain|>",
    200005: "<|channel|>",
    200006: "<|start|>",
    200007: "<|end|>",
    200008: "<|message|>",
    200012: "<|call|>",
    200018: "<|endofprompt|>",
}  # the others are <|reserved_ID|>
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join(  # o200k's, from tiktoken
    [
        rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]*[{LOWER}]+{CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]+[{LOWER}]*{CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheels", type=Path, required=True)
    parser.add_argument("--assets", type=Path, required=True)
    arguments = parser.parse_args()

    arguments.assets.mkdir(parents=True, exist_ok=True)
    for name, (package, member) in MEMBERS.items():
        (wheel,) = arguments.wheels.glob(f"{package}-*.whl")
        with zipfile.ZipFile(wheel) as opened:
            (arguments.assets / name).write_bytes(opened.read(member))
    build((arguments.assets / RANKS).read_bytes()).save(str(arguments.assets / TOKENIZER))
    named = {"bos_token": "<|startoftext|>", "eos_token": "<|return|>", "pad_token": "<|endoftext|>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **named}
    (arguments.assets / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    for name, wanted in SHA256.items():
        found = hashlib.sha256((arguments.assets / name).read_bytes()).hexdigest()
        if found != wanted:
            raise SystemExit(f"{arguments.assets / name} has sha256 {found}; the official file has {wanted}")


def build(ranks: bytes) -> Tokenizer:
    """The tokenizer of a tiktoken file: a token's merges are all its splits into two tokens, best ranks first."""
    by_bytes = {
        base64.b64decode(token): int(rank) for token, rank in (line.split() for line in ranks.splitlines() if line)
    }
    spelled = {token: spelling(token) for token in by_bytes}
    merges = []
    for token in by_bytes:  # in the order of their ranks
        splits = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = [pair for pair in splits if pair[0] in by_bytes and pair[1] in by_bytes]
        known.sort(key=lambda pair: (by_bytes[pair[0]], by_bytes[pair[1]]))
        merges += [(spelled[left], spelled[right]) for left, right in known]
    vocabulary = {spelled[token]: rank for token, rank in by_bytes.items()}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    ids = range(FIRST_CONTROL_TOKEN, FIRST_CONTROL_TOKEN + NUM_CONTROL_TOKENS)
    texts = [CONTROL_TOKENS.get(token_id, f"<|reserved_{token_id}|>") for token_id in ids]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in texts])
    return tokenizer


def spelling(token: bytes) -> str:
    """Bytes as byte-level BPE writes them: printable ones as themselves, the others as the letters from U+0100 on."""
    return "".join(BYTE_LETTERS[byte] for byte in token)


def byte_letters() -> dict[int, str]:
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}


BYTE_LETTERS = byte_letters()

if __name__ == "__main__":
    main()
