"""Writes the log probabilities of an answer's tokens as OpenAI's two kinds of completions have them."""

from collections.abc import Sequence
from typing import Any

from pipeline.engine.request import TokenLogProb
from pipeline.prompts.tokenizer import Tokenizer, token_bytes
from pipeline.serve.text_stream import REPLACEMENT, decoded

LEAST = -9999.0  # JSON has no infinity: of a token that the model finds impossible


def chat_logprobs(tokenizer: Tokenizer, found: Sequence[TokenLogProb]) -> dict[str, Any]:
    """Returns the `logprobs` object of a chat's choice."""
    content = [
        {**_named(tokenizer, one.token_id, one.log_prob), "top_logprobs": [_named(tokenizer, *top) for top in one.top]}
        for one in found
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokenizer: Tokenizer, found: Sequence[TokenLogProb | int], offset: int) -> dict[str, Any]:
    """Returns the `logprobs` object of a completion's choice, whose text begins at `offset`.

    The first token of a text has no log probability: it is its id alone.
    """
    texts = [_shown(tokenizer, one if isinstance(one, int) else one.token_id) for one in found]
    lengths = [len(text) for text in texts]
    return {
        "tokens": texts,
        "token_logprobs": [None if isinstance(one, int) else _finite(one.log_prob) for one in found],
        "top_logprobs": [
            None if isinstance(one, int) else {_shown(tokenizer, token): _finite(value) for token, value in one.top}
            for one in found
        ],
        "text_offset": [offset + sum(lengths[:index]) for index in range(len(found))],
    }


def _named(tokenizer: Tokenizer, token_id: int, value: float) -> dict[str, Any]:
    return {
        "token": _shown(tokenizer, token_id),
        "logprob": _finite(value),
        "bytes": list(token_bytes(tokenizer, token_id)),
    }


def _finite(value: float) -> float:
    return max(value, LEAST)


def _shown(tokenizer: Tokenizer, token_id: int) -> str:
    """Returns a token's text; one that holds a part of a character is written as its bytes, as OpenAI writes it."""
    text = decoded(tokenizer, [token_id])
    if REPLACEMENT not in text:
        return text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes(tokenizer, token_id))
