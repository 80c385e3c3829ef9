"""Several commands that make one teacher cache together: which shards each makes, and who completes it."""

import contextlib
import dataclasses
import logging
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from pipeline.artifacts import artifact, storage
from pipeline.artifacts.storage import StoragePath
from pipeline.teacher_cache import shards
from pipeline.teacher_cache.shards import Plan

log = logging.getLogger("pipeline")


@dataclasses.dataclass(frozen=True)
class Writer:
    """Writer `index` of `count`: it makes every `count`-th shard, and the one that ends last completes the cache."""

    index: int
    count: int

    def share(self, plans: Sequence[Plan]) -> tuple[list[Plan], list[Plan]]:
        """The shards that this writer makes, and those that others do."""
        mine = [index % self.count == self.index for index in range(len(plans))]
        return (
            [one for one, is_mine in zip(plans, mine, strict=True) if is_mine],
            [one for one, is_mine in zip(plans, mine, strict=True) if not is_mine],
        )

    def clear(self, path: StoragePath, mine: Sequence[Plan], complete: Collection[StoragePath]) -> None:
        """Remove what an earlier run left half made; of other writers' shards nothing is known here."""
        if isinstance(path, Path):
            artifact.open_scratch(path, resume=True)
        if self.count == 1:
            shards.clear_except(artifact.scratch_of(path), complete)
            return
        for one in mine:
            if one.path not in complete:
                storage.remove(one.path)

    @property
    def part(self) -> str:
        """The part of a cache that this writer makes, by which it is locked; all of it where it is the only one."""
        return "" if self.count == 1 else f".{self.index}"

    def alone(self, path: StoragePath) -> AbstractContextManager[None]:
        """Lets one writer at a time complete a cache."""
        return contextlib.nullcontext() if self.count == 1 else artifact.exclusive(path)

    def log_missing(self, plans: Sequence[Plan], complete: Collection[StoragePath]) -> None:
        """Logs which shards other writers still have to make."""
        missing = [index for index, one in enumerate(plans) if one.path not in complete]
        log.info(
            "teacher_cache: this writer's %d shards are complete; %d of %d are still missing, of the writers %s. The "
            "one that ends last completes the cache; if all have ended, run any of them again",
            len(self.share(plans)[0]),
            len(missing),
            len(plans),
            ", ".join(str(writer) for writer in sorted({index % self.count for index in missing})),
        )
