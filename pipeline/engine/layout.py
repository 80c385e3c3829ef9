"""How many positions and prefill rows an engine's arrays have."""

PREFILL_ROWS = 8  # prompts that a prefill step runs side by side, at most


def rows_of_shard(num_slots: int) -> int:
    """Returns how many prompts a shard of `num_slots` slots prefills side by side."""
    return min(num_slots, PREFILL_ROWS)


def num_positions(max_length: int, prefill_chunk: int, block_size: int) -> int:
    """Returns the positions of a slot's row for requests of at most `max_length`, so that no write passes its end."""
    return max_length + max(prefill_chunk, block_size)
