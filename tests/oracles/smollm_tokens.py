"""SmolLM2's tokens of plain texts, from the vocabulary and merges of a GGUF file, written out from first principles.

A text is cut at every digit, then by GPT-2's pattern; each piece's bytes are spelled as GPT-2 spells bytes and
merged pair by pair, the earliest merge first. (llama.cpp names this pre-tokenizer "smollm".)

in:  {"texts": [text, ...]}
out: {"token_ids": [[id, ...], ...]}
"""

import argparse
import itertools
import json
from pathlib import Path

import regex
from gguf import GGUFReader

DIGIT = regex.compile(r"\p{N}")
WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--inputs", type=Path, required=True)
    parser.add_argument("--outputs", type=Path, required=True)
    arguments = parser.parse_args()

    fields = GGUFReader(arguments.gguf).fields
    ids = {token: index for index, token in enumerate(fields["tokenizer.ggml.tokens"].contents())}
    merges = fields["tokenizer.ggml.merges"].contents()
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
    texts = json.loads(arguments.inputs.read_text())["texts"]
    token_ids = [[ids[token] for piece in pieces(text) for token in merged(piece, ranks)] for text in texts]
    arguments.outputs.write_text(json.dumps({"token_ids": token_ids}))


def pieces(text: str) -> list[str]:
    """Digits alone, everything between them by GPT-2's pattern."""
    found, at = [], 0
    for digit in DIGIT.finditer(text):
        found += [*WORD.findall(text[at : digit.start()]), digit.group()]
        at = digit.end()
    return found + WORD.findall(text[at:])


def merged(piece: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """The tokens of one piece, in GPT-2's spelling."""
    parts = [SPELLING[byte] for byte in piece.encode()]
    while len(parts) > 1:
        pairs = list(itertools.pairwise(parts))
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        at = pairs.index(best)
        parts[at : at + 2] = ["".join(best)]
    return parts


def spelling() -> dict[int, str]:
    """Printable bytes of Latin-1 stand for themselves, the others for the characters from U+0100 on."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(0x100 + index) for index, byte in enumerate(hidden)}


SPELLING = spelling()

if __name__ == "__main__":
    main()
