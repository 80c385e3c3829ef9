"""Answers that repeat themselves: a draft is accepted on them as on nothing else, so that they flatter it."""

from collections.abc import Sequence

import numpy as np

LONGEST_PERIOD = 32  # tokens
LEAST_TIMES, LEAST_TOKENS = 4, 48  # shorter repetitions are what people ask for: a word five times, a table's rule


def is_looping(token_ids: Sequence[int]) -> bool:
    """Returns whether an answer says the same 1 to 32 tokens again and again: 4 times and 48 tokens at least."""
    ids = np.asarray(token_ids)
    for period in range(1, min(LONGEST_PERIOD, len(ids) // LEAST_TIMES) + 1):
        longest = _longest_run(ids[period:] == ids[:-period]) + period
        if longest >= max(LEAST_TIMES * period, LEAST_TOKENS):
            return True
    return False


def _longest_run(holds: np.ndarray) -> int:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], holds.astype(np.int8), [0]])))
    return int((edges[1::2] - edges[::2]).max(initial=0))
