"""Several sequences to a row of fixed length: which share one follows from their lengths and the epoch's draw alone."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from pipeline.errors import PipelineError


def pack(costs: Int[np.ndarray, " S"], order: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of indices whose costs are at most `capacity` in sum: each, in `order`, into the fullest row that takes it.

    How many rows there are, and how full each, depends on the costs in that order alone and not on which index has
    which: orders that differ among equal costs alone give as many rows. With descending costs, best-fit decreasing.
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set where some row has room for r more: the best fit is the lowest bit from the cost on
    for index in order:
        cost = int(costs[index])
        fitting = rooms >> cost
        if fitting:
            room = cost + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            rooms ^= (not with_room[room]) << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        with_room[room - cost].append(row)
        rooms |= 1 << room - cost
    return rows


def anchors_per_row(num_tokens: Int[np.ndarray, " S"], num_anchors: Int[np.ndarray, " S"], row_tokens: int) -> int:
    """Places for anchors in a row of `row_tokens`: as many as that many tokens have on average, or a sequence alone."""
    return max(int(num_anchors.max()), -(-int(num_anchors.sum()) * row_tokens // int(num_tokens.sum())))


def costs_of(
    num_tokens: Int[np.ndarray, " S"], num_anchors: Int[np.ndarray, " S"], row_tokens: int, row_anchors: int
) -> Int[np.ndarray, " S"]:
    """The larger of the shares that sequences take of a row of `row_tokens` tokens and `row_anchors` blocks, in tokens.

    Rows of sequences whose costs are at most `row_tokens` in sum have room for all of their tokens and anchors.
    """
    return np.maximum(num_tokens, -(-num_anchors * row_tokens // row_anchors))


def require_fitting(num_tokens: Int[np.ndarray, " S"], row_tokens: int) -> None:
    """PipelineError when some sequence is longer than a row."""
    longer = np.flatnonzero(num_tokens > row_tokens)
    if len(longer):
        raise PipelineError(
            f"train.pack_tokens is {row_tokens}; {len(longer)} of {len(num_tokens)} sequences are longer, the longest "
            f"has {num_tokens.max()} tokens: set train.pack_tokens to at least that, or lower "
            "teacher_cache.max_new_tokens"
        )
