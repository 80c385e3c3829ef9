"""Which slots a step computes: all of them, or the few whose requests decode."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int

from pipeline.engine.scheduler import Running
from pipeline.engine.state import EngineState
from pipeline.model.layers import token_rules
from pipeline.model.layers.kv_pages import PageTables

CHANGED = ("anchor", "length", "remaining", "active", "history", "features", "num_features")  # of slots, by steps
OF_SLOTS = (*CHANGED, "rules", "masks")


@dataclasses.dataclass(frozen=True)
class StepRows:
    """Holds the slots of a step's rows, and the request of each row that has one.

    `indices` are slots of each row's shard, all shards' rows one after another; a number past the shard's last slot
    fills rows that are not needed. It is None where a step computes all slots, each in a row of its own. `slots` are
    those of the rows in `by_row`, over all shards. `count` is the rows of a shard.
    """

    count: int
    indices: np.ndarray | None
    slots: Mapping[int, int]
    by_row: Mapping[int, Running]


def rows_for(by_slot: Mapping[int, Running], counts: Sequence[int], slots_of_shard: int, num_shards: int) -> StepRows:
    """Returns the fewest rows, of `counts` for each shard or all of its slots, that hold these requests."""
    of_shard: list[list[int]] = [[] for _ in range(num_shards)]
    for slot in sorted(by_slot):
        of_shard[slot // slots_of_shard].append(slot)
    needed = max(map(len, of_shard))
    count = min((count for count in counts if needed <= count < slots_of_shard), default=slots_of_shard)
    if count == slots_of_shard:
        return StepRows(count, None, {slot: slot for slot in by_slot}, by_slot)
    indices = np.full((num_shards, count), slots_of_shard, np.int32)
    slots: dict[int, int] = {}
    for shard, found in enumerate(of_shard):
        indices[shard, : len(found)] = [slot % slots_of_shard for slot in found]
        slots |= {shard * count + index: slot for index, slot in enumerate(found)}
    return StepRows(count, indices.reshape(-1), slots, {row: by_slot[slot] for row, slot in slots.items()})


def of_rows(step: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a step that decodes as one of some slots: behind the tables it takes their `rows`, None for all."""

    def run(target: Any, draft: Any, state: EngineState, tables: PageTables, rows: Any, *more: Any) -> Any:
        if rows is None:
            return step(target, draft, state, tables, *more)
        new, output = step(target, draft, _taken(state, rows), tables, *more)
        return _put(state, rows, new), output

    return run


def read_rows(step: Callable[..., Any]) -> Callable[..., Any]:
    """Does what `of_rows` does, for a step that changes nothing."""

    def run(target: Any, draft: Any, state: EngineState, tables: PageTables, rows: Any) -> Any:
        return step(target, draft, state if rows is None else _taken(state, rows), tables)

    return run


def extend_rows(step: Callable[..., EngineState]) -> Callable[..., EngineState]:
    """Does what `of_rows` does, for a step of the draft alone."""

    def run(draft: Any, state: EngineState, tables: PageTables, rows: Any) -> EngineState:
        if rows is None:
            return step(draft, state, tables)
        return _put(state, rows, step(draft, _taken(state, rows), tables))

    return run


def _taken(state: EngineState, rows: Int[Array, " R"]) -> EngineState:
    """Returns the state of some slots of a shard; a row past the last slot is not active."""
    parts = {name: token_rules.rows_of(getattr(state, name), rows) for name in OF_SLOTS}
    found = dataclasses.replace(state, **parts)
    return dataclasses.replace(found, active=found.active & (rows < len(state.active)))


def _put(state: EngineState, rows: Int[Array, " R"], new: EngineState) -> EngineState:
    """Returns the state with what a step made of some slots, and of the caches."""
    parts = {
        name: jax.tree.map(
            lambda old, part: old.at[rows].set(part, mode="drop"), getattr(state, name), getattr(new, name)
        )
        for name in CHANGED
    }
    return dataclasses.replace(state, cache=new.cache, draft_cache=new.draft_cache, **parts)
