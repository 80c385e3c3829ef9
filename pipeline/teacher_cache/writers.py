"""Divides the shards of one teacher cache between several commands, and lets the last one complete it."""

import contextlib
import dataclasses
import logging
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from pipeline.artifacts import artifact, storage
from pipeline.artifacts.storage import StoragePath
from pipeline.teacher_cache import shards
from pipeline.teacher_cache.shards import ShardPlan

log = logging.getLogger("pipeline")


@dataclasses.dataclass(frozen=True)
class Writer:
    """Holds the number of one writer: each makes every `count`-th shard, and the last to end completes the cache."""

    index: int
    count: int

    def share(self, plans: Sequence[ShardPlan]) -> tuple[list[ShardPlan], list[ShardPlan]]:
        """Returns the shards that this writer makes, and those of the other writers."""
        mine = [index % self.count == self.index for index in range(len(plans))]
        return (
            [plan for plan, is_mine in zip(plans, mine, strict=True) if is_mine],
            [plan for plan, is_mine in zip(plans, mine, strict=True) if not is_mine],
        )

    def clear(self, path: StoragePath, mine: Sequence[ShardPlan], complete: Collection[StoragePath]) -> None:
        """Removes incomplete shards of an earlier run; leaves those of other writers, which may be at work."""
        if isinstance(path, Path):
            artifact.open_scratch(path, resume=True)
        if self.count == 1:
            shards.clear_except(artifact.scratch_of(path), complete)
            return
        for plan in mine:
            if plan.path not in complete:
                storage.remove(plan.path)

    @property
    def part(self) -> str:
        """Returns the suffix of the lock on this writer's part of a cache; empty for an only writer."""
        return "" if self.count == 1 else f".{self.index}"

    def alone(self, path: StoragePath) -> AbstractContextManager[None]:
        """Lets one writer at a time complete a cache."""
        return contextlib.nullcontext() if self.count == 1 else artifact.exclusive(path)

    def remove_locks(self, path: StoragePath) -> None:
        """Removes the locks of all writers of a complete cache: a writer that ended before it was complete left one."""
        if isinstance(path, Path) and self.count > 1:
            for index in range(self.count):
                path.with_name(f"{path.name}.{index}.lock").unlink(missing_ok=True)

    def log_missing(self, plans: Sequence[ShardPlan], complete: Collection[StoragePath]) -> None:
        """Logs which shards other writers still have to make."""
        missing = [index for index, plan in enumerate(plans) if plan.path not in complete]
        log.info(
            "teacher_cache: this writer's %d shards are complete; %d of %d are still missing, of the writers %s. The "
            "one that ends last completes the cache; if all have ended, run any of them again",
            len(self.share(plans)[0]),
            len(missing),
            len(plans),
            ", ".join(str(writer) for writer in sorted({index % self.count for index in missing})),
        )
