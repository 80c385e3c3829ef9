"""Which tokens each slot's request may be given, as bits for the devices."""

from collections.abc import Mapping

import numpy as np

from pipeline.engine.scheduler import Running
from pipeline.model.layers.token_rules import num_words


def fill_masks(
    constrained: Mapping[int, Running], drafted: np.ndarray | None, num_rows: int, length: int, vocab_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Returns masks uint32 [rows, length, words], which rows have one, and the drafted tokens [rows, length - 1].

    `constrained` has requests by their rows, and `drafted` is None where nothing is drafted. Every token is allowed
    in the other rows.
    """
    masks = np.full((num_rows, length, num_words(vocab_size)), np.iinfo(np.uint32).max, np.uint32)
    is_masked = np.zeros(num_rows, bool)
    drafted = None if drafted is None else drafted.copy()
    for row, one in constrained.items():
        assert one.constraint is not None
        is_masked[row] = True
        found = one.constraint.fill([] if drafted is None else drafted[row].tolist(), masks[row])
        if drafted is not None:
            drafted[row] = found
    return masks, is_masked, drafted
