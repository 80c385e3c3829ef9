"""Packs several sequences into a row of fixed length, by their lengths and the epoch's draw alone."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from pipeline.errors import PipelineError


def pack(costs: Int[np.ndarray, " S"], order: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs indices, in `order`, each into the fullest row that has room; returns rows of cost sum <= `capacity`.

    The number of rows and their fill depend only on the costs in that order: orders that differ among equal costs alone
    give as many rows. With descending costs this is best-fit decreasing.
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set when some row has room for r more: the best fit is the lowest set bit from the cost up
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
    """Returns how many anchors a row has room for: the average of `row_tokens` tokens, or one sequence's most."""
    return max(int(num_anchors.max()), -(-int(num_anchors.sum()) * row_tokens // int(num_tokens.sum())))


def costs_of(
    num_tokens: Int[np.ndarray, " S"], num_anchors: Int[np.ndarray, " S"], row_tokens: int, row_anchors: int
) -> Int[np.ndarray, " S"]:
    """Returns sequences' costs in tokens: the larger of the shares they take of a row's tokens and of its anchors.

    Sequences whose costs are at most `row_tokens` in sum fit into a row with all of their tokens and anchors.
    """
    return np.maximum(num_tokens, -(-num_anchors * row_tokens // row_anchors))


def require_sequences_fit(num_tokens: Int[np.ndarray, " S"], row_tokens: int) -> None:
    """Raises PipelineError when some sequence is longer than a row."""
    longer = np.flatnonzero(num_tokens > row_tokens)
    if len(longer):
        raise PipelineError(
            f"train.pack_tokens is {row_tokens}; {len(longer)} of {len(num_tokens)} sequences are longer, the longest "
            f"has {num_tokens.max()} tokens: set train.pack_tokens to at least that, or lower "
            "teacher_cache.max_new_tokens"
        )
