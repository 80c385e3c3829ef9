"""How few tokens a text can have: what is far too long for a context is seen without encoding it.

Encoding a text of 3 MB takes seconds and a gigabyte of memory.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import pre_tokenizers

from pipeline.errors import PipelineError
from pipeline.prompts.tokenizer import Tokenizer, fast_tokenizer

SPLITS = ("Split", "ByteLevel", "Digits")  # pre-tokenizers that cut a text and drop nothing of it


class TextTooLong(PipelineError):
    """Says that a text, of so many characters, is not encoded, for it has more than were asked for."""

    def __init__(self, num_characters: int, most_characters: int) -> None:
        super().__init__(f"the text has {num_characters} characters; at most {most_characters} are encoded")
        self.num_characters = num_characters


def longest_token(tokenizer: Tokenizer) -> int | None:
    """Returns the bytes of the longest token: a text has no fewer tokens than its characters divided by them.

    None is returned where nothing of the kind is certain, because the tokenizer may leave out or shorten some of a
    text: only byte-level ones without a normalizer are known not to.
    """
    backend = fast_tokenizer(tokenizer)
    if backend is None or backend.normalizer is not None or backend.pre_tokenizer is None:
        return None
    pieces = list(_pieces(json.loads(backend.pre_tokenizer.__getstate__())))
    added, vocabulary = backend.get_added_tokens_decoder(), backend.get_vocab(with_added_tokens=False)
    is_lossless = (
        all(piece["type"] in SPLITS and piece.get("behavior") != "Removed" for piece in pieces)
        and any(piece["type"] == "ByteLevel" for piece in pieces)
        and all(byte in vocabulary for byte in pre_tokenizers.ByteLevel.alphabet())
        and not any(token.lstrip or token.rstrip for token in added.values())
    )
    if not is_lossless:
        return None
    return max([*map(len, vocabulary), *(len(token.content.encode()) for token in added.values())])


def _pieces(pre_tokenizer: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yields the parts that a pre-tokenizer is a sequence of."""
    if pre_tokenizer["type"] == "Sequence":
        for one in pre_tokenizer["pretokenizers"]:
            yield from _pieces(one)
    else:
        yield pre_tokenizer
