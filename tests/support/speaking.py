"""A random target whose answers are well-formed: a text that is cut or ended, in Harmony with its headers.

Such an answer can be written as messages and be read back to the very tokens. Each token of a header has a dimension of
its own, by which it chooses what follows it. Texts are chosen freely, from characters that the tokenizer never joins.
"""

import dataclasses
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pipeline.model.gpt_oss import weights as gpt_oss_weights
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.hf.directory import save_target
from tests.support.cached import MODEL

VOCAB_SIZE = 400
LOUD = 2000.0  # of a header's token in its own dimension: what the layers add is small beside it
CHATML_ENDS = {"<|im_end|>": 1.0}
HARMONY_ENDS = {"<|end|>": 1.5, "<|return|>": 1.0}
HARMONY = (  # what follows what; of several the context chooses
    ("assistant", ("<|channel|>",)),
    ("<|channel|>", ("analysis", "final")),
    ("analysis", ("<|message|>",)),
    ("final", ("<|message|>",)),
    ("<|end|>", ("<|start|>",)),
    ("<|start|>", ("assistant",)),
)
ANSWER = re.compile(
    r"(?:<\|channel\|>analysis<\|message\|>(?P<analysis>[^<]+)<\|end\|><\|start\|>assistant)?"
    r"<\|channel\|>final<\|message\|>(?P<final>[^<]+)(?:<\|return\|>)?"
)


def save_speaking_target(
    directory: Path, tokenizer: Any, ends: Mapping[str, float], follow: Sequence[tuple[str, Sequence[str]]] = ()
) -> None:
    """Writes the target; `ends` may end a text, each as often as its weight says, and `follow` lists its headers."""
    config = dataclasses.replace(MODEL, vocab_size=VOCAB_SIZE)
    weights = jax.jit(lambda key: gpt_oss_weights.random_weights(config, key))(jax.random.key(3))
    random, ids = np.random.default_rng(4), tokenizer.convert_tokens_to_ids
    noisy = jax.tree.map(lambda leaf: leaf + 0.3 * random.normal(size=leaf.shape).astype(np.float32), weights)
    embedding = np.array(noisy.embedding)
    free = np.zeros(VOCAB_SIZE, bool)
    free[[*_text_ids(tokenizer), *map(ids, ends)]] = True
    head = random.normal(size=weights.head.shape).astype(np.float32)
    for token, weight in ends.items():
        head[:, ids(token)] *= weight
    head[:, ~free] = 0  # a logit of 0 is never the best of many
    head[: len(follow)] = 0
    embedding[:, : len(follow)] = 0
    for dimension, (token, following) in enumerate(follow):
        embedding[ids(token)] = LOUD * (np.arange(config.hidden_size) == dimension)
        for each in following:
            head[len(follow) :, ids(each)] = 0.2 * random.normal(size=config.hidden_size - len(follow))
            head[dimension, ids(each)] = 1
    spoken = dataclasses.replace(noisy, embedding=jnp.asarray(embedding), norm=weights.norm, head=jnp.asarray(head))
    save_target(directory, TargetModel(config, spoken), {"eos_token_id": tokenizer.eos_token_id})
    tokenizer.save_pretrained(directory)


def _text_ids(tokenizer: Any) -> list[int]:
    """Characters no two of which are ever one token."""
    found: list[str] = []

    def num_tokens(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    for character in string.ascii_letters + string.digits:
        pairs = [character * 2, *(pair for other in found for pair in (character + other, other + character))]
        if all(num_tokens(pair) == 2 for pair in pairs):
            found.append(character)
    assert len(found) > 30
    return [tokenizer.encode(character, add_special_tokens=False)[0] for character in found]


def harmony_message(text: str) -> dict[str, str] | None:
    """The message of an answer that is well-formed, whole or cut in its final text."""
    found = ANSWER.fullmatch(text)
    if found is None:
        return None
    thoughts = {"reasoning_content": found["analysis"]} if found["analysis"] else {}
    return {"role": "assistant", "content": found["final"], **thoughts}
