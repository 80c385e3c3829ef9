"""Tells prompts of random tokens, as load generators send them, from text: a draft's acceptance there means nothing.

Two tokens of a text are equal far more often than two that are drawn evenly from the vocabulary, for which it is 1 in
V: the index of coincidence (Friedman, The Index of Coincidence and Its Applications in Cryptography, 1922). Text in
English has about 0.01 by the tokens of GPT-OSS; runs of consecutive token ids, which vLLM's and SGLang's random data
sets have, are nearly without coincidences too.
"""

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from pipeline.errors import PipelineError

EVEN_TIMES, LEAST_OF_TEXT = 3, 8e-4  # a text's index is above both: 3 in V, and 0.0008
LEAST_TOKENS = 64  # fewer decide nothing


def require_text(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Raises PipelineError when the prompts' tokens are as evenly distributed as random ones.

    What all prompts begin and end with is the chat template's, and is left out.
    """
    lists = [list(prompt) for prompt in prompts]
    begin, end = num_common(lists), num_common([prompt[::-1] for prompt in lists])
    tokens = np.array([token for prompt in lists for token in prompt[begin : len(prompt) - end]], np.int64)
    limit = max(EVEN_TIMES / vocab_size, LEAST_OF_TEXT)
    if len(tokens) >= LEAST_TOKENS and (found := coincidence(tokens)) < limit:
        raise PipelineError(
            f"bench: the prompts are random tokens, not text: two of their tokens are equal with a probability of "
            f"{found:.2g} (text is above {limit:.2g}); what a draft accepts behind them says nothing of real use: give "
            "prompts that people would send"
        )


def coincidence(tokens: Int[np.ndarray, " N"]) -> float:
    """Returns the probability that two of the tokens, drawn without replacement, are equal."""
    counts = np.unique(tokens, return_counts=True)[1]
    return float((counts * (counts - 1)).sum() / (len(tokens) * (len(tokens) - 1)))


def num_common(prompts: Sequence[Sequence[int]]) -> int:
    """Returns how many tokens all prompts begin with; none of a single one."""
    columns = zip(*prompts, strict=False) if len(prompts) > 1 else ()
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
