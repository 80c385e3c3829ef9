"""Encodes conversations whose texts spell control tokens: these stay ordinary text and never become the tokens."""

import itertools
import re
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from pipeline.prompts.tokenizer import Tokenizer, fast_tokenizer

Change = Callable[[str], str]


def encode(tokenizer: Tokenizer, plain: str, render: Callable[[Change], str]) -> list[int] | None:
    """Returns the tokens of a conversation, in which control tokens come from the template alone.

    `render` applies the template to texts that were changed by its argument, and `plain` is what it gives for unchanged
    ones. What texts spell is replaced by marks before the template is applied, so that the control tokens of the result
    are the template's; the text between them is encoded by the tokenizer without its added tokens. Returns None where
    that cannot be relied on: the template reads the texts, or the tokenizer encodes a text otherwise than piece by
    piece.
    """
    added, ordinary = tokenizer.get_added_vocab(), _ordinary(tokenizer)
    if ordinary is None:
        return None
    spelled = _any_of(added)
    number = next(number for number in itertools.count() if f"QZ{number}X" not in plain)
    tokens = sorted(added)
    marks = {token: f"QZ{number}X{index}X" for index, token in enumerate(tokens)}
    masked = render(lambda text: spelled.sub(lambda found: marks[found[0]], text))

    def unmasked(text: str) -> str:
        return re.sub(f"QZ{number}X([0-9]+)X", lambda found: tokens[int(found[1])], text)

    pieces = re.split(f"({spelled.pattern})", masked)  # text and control tokens in turn

    def encoded(change: Change) -> list[list[int]]:
        # as a batch: other threads run meanwhile, which they do not while a single text is encoded
        texts = ordinary.encode_batch([change(piece) for piece in pieces[::2]], add_special_tokens=False)
        found = iter(texts)
        return [[added[piece]] if index % 2 else next(found).ids for index, piece in enumerate(pieces)]

    joined = list(itertools.chain(*encoded(lambda text: text)))
    if unmasked(masked) != plain or joined != tokenizer.encode(masked, add_special_tokens=False):
        return None
    found = encoded(unmasked)
    if set(itertools.chain(*found[::2])) & set(added.values()):  # a model may have them among its own pieces
        return None
    return list(itertools.chain(*found))


def _any_of(tokens: Any) -> re.Pattern[str]:
    """Returns the pattern of the longest of these tokens at the leftmost place, as tokenizers look for them."""
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)))


def _ordinary(tokenizer: Tokenizer) -> FastTokenizer | None:
    """Returns the tokenizer without added tokens; None where it is none of the tokenizers library's."""
    backend = fast_tokenizer(tokenizer)
    if backend is None:
        return None
    ordinary = FastTokenizer(backend.model)  # shared, not copied
    if backend.normalizer is not None:
        ordinary.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        ordinary.pre_tokenizer = backend.pre_tokenizer
    return ordinary
