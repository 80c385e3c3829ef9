"""Lays sequences out as rows, and divides the rows of a batch among hosts."""

from collections.abc import Sequence

import ml_dtypes
import numpy as np
from jaxtyping import Int

from pipeline.errors import PipelineError
from pipeline.store.layout import CachedSequence

LENGTH_STEP = 32  # padded lengths are multiples of it


def padded_row_length(num_tokens: Int[np.ndarray, " sequences"], *, divisor: int = 1) -> int:
    """Returns the length of the longest sequence, or its half (`divisor` 2), rounded up to whole LENGTH_STEPs."""
    return -(-int(num_tokens.max()) // (divisor * LENGTH_STEP)) * LENGTH_STEP


def stack(sequences: Sequence[CachedSequence], num_positions: int) -> dict[str, np.ndarray]:
    """Returns sequences as rows of `num_positions` tokens: token_ids [B, T], generated [B, T], features [B, T, L*D]."""
    width = 0 if sequences[0].features is None else sequences[0].features.shape[1]
    fields = lay_out([[sequence] for sequence in sequences], num_positions, width)
    del fields["starts"]
    return fields


def lay_out(rows: Sequence[Sequence[CachedSequence]], num_positions: int, width: int) -> dict[str, np.ndarray]:
    """Does as `stack` for rows that hold any number of sequences, end to end; `starts` [B, T] says where each begins.

    Features are `width` wide: 0 when the target computes them later.
    """
    shape = (len(rows), num_positions)
    token_ids = np.zeros(shape, dtype=np.int32)
    generated = np.zeros(shape, dtype=bool)
    features = np.zeros((*shape, width), dtype=ml_dtypes.bfloat16)
    starts = np.full(shape, num_positions, dtype=np.int32)
    for row, sequences in enumerate(rows):
        start = 0
        for sequence in sequences:
            end = start + len(sequence.token_ids)
            token_ids[row, start:end] = sequence.token_ids
            generated[row, start + sequence.prompt_tokens : end] = True
            if width:
                features[row, start:end] = sequence.features
            starts[row, start:end] = start
            start = end
    return {"token_ids": token_ids, "generated": generated, "features": features, "starts": starts}


def rows_of_host(num_sequences: int, index: int, count: int) -> slice:
    """Returns the rows of a batch that host `index` of `count` reads.

    Raises PipelineError when the rows cannot be split evenly over hosts.
    """
    if num_sequences % count:
        raise PipelineError(
            f"train.batch_sequences is {num_sequences}; {count} hosts read equal parts of a batch: give a multiple of "
            f"{count}"
        )
    per_host = num_sequences // count
    return slice(index * per_host, (index + 1) * per_host)
