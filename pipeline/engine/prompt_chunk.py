"""The next tokens of the prompts that are being computed, as the arrays that a prefill step takes."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from pipeline.engine.sampling_params import set_row
from pipeline.engine.scheduler import Running
from pipeline.engine.slot_pages import SlotPages
from pipeline.engine.state import PrefillChunk
from pipeline.model.layers.kv_pages import NOWHERE, PageTables
from pipeline.model.layers.token_rules import TokenRules, greedy_rules


@functools.cache  # not at import: JAX would take its devices before several hosts have found each other
def _greedy_rules() -> TokenRules:
    return jax.tree.map(np.asarray, greedy_rules(1))


def chunk_of(
    by_row: Mapping[int, Running],
    pages: SlotPages,
    shape: tuple[int, int],
    *,
    first_id: Callable[[Running], int],
    stops_of: Callable[[Running], tuple[int, ...]],
) -> PrefillChunk:
    """Returns the next tokens of the requests in these rows, whose pages are taken.

    The shape is that of the tokens [R, T], where each shard has the same number of rows, for its own slots.
    `first_id` is the token from which a request decodes, or -1 for the target's own; `stops_of` are its stop tokens.
    """
    rows, columns = shape
    full: Callable[..., Any] = np.full  # a jitted step takes NumPy's arrays as it takes JAX's
    tables = np.full((2, rows, pages.layout.pages_of_row), NOWHERE, np.int32)
    chunk = PrefillChunk(
        rows=full(rows, pages.slots_of_shard, np.int32),  # past the last slot: dropped
        token_ids=full((rows, columns), 0, np.int32),
        start=full(rows, 0, np.int32),
        num_tokens=full(rows, 1, np.int32),
        budget=full(rows, 0, np.int32),
        is_last=full(rows, False, bool),
        first_ids=full(rows, -1, np.int32),
        following=full((rows, columns), 0, np.int32),
        scored=full(rows, False, bool),
        tables=PageTables(*tables),
        rules=jax.tree.map(lambda one: np.repeat(one, rows, axis=0), _greedy_rules()),
    )
    for row, one in by_row.items():
        start = one.num_prefilled
        part = one.tokens[start : min(start + columns, one.num_to_prefill)]
        grown = pages.grow(one.slot, start + len(part))
        assert grown, "a prompt's pages are taken when it gets its slot"
        chunk.rows[row] = pages.row_of(one.slot)
        chunk.token_ids[row, : len(part)] = part
        chunk.start[row] = start
        chunk.num_tokens[row] = len(part)
        chunk.budget[row] = one.request.max_new_tokens - max(one.num_generated - 1, 0)
        chunk.is_last[row] = start + len(part) == one.num_to_prefill
        chunk.first_ids[row] = first_id(one)
        if one.request.sampling.prompt_logprobs is not None:
            behind = one.tokens[start + 1 : start + 1 + len(part)]
            chunk.following[row, : len(behind)] = behind
            chunk.scored[row] = True
        tables[:, row] = pages.row_tables(one.slot)
        set_row(chunk.rules, row, one.request.sampling, stops_of(one), len(one.request.prompt_ids))
    return chunk
