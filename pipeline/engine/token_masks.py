"""Which tokens each slot's request may be given, as bits for the devices."""

from collections.abc import Mapping

import numpy as np

from pipeline.engine.scheduler import Running
from pipeline.model.layers.token_rules import num_words


def fill_masks(
    constrained: Mapping[int, Running], drafted: Mapping[int, np.ndarray], num_slots: int, length: int, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns masks uint32 [slots, length, words], and which slots have one; every token is allowed in the others.

    `constrained` has requests by their slots, and `drafted` the tokens of slots for which some are drafted, which are
    changed where the grammar knows what must follow.
    """
    masks = np.full((num_slots, length, num_words(vocab_size)), np.iinfo(np.uint32).max, np.uint32)
    is_masked = np.zeros(num_slots, bool)
    for slot, one in constrained.items():
        assert one.constraint is not None
        is_masked[slot] = True
        proposed = drafted.get(slot)
        found = one.constraint.fill([] if proposed is None else proposed.tolist(), masks[slot])
        if proposed is not None:
            proposed[:] = found
    return masks, is_masked
