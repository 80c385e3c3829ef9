"""Several commands that make one teacher cache together: which shards each makes, and who completes it."""

import contextlib
import dataclasses
import fcntl
import logging
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from pipeline import artifacts, places
from pipeline.places import Place
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

    def clear(self, path: Place, mine: Sequence[Plan], complete: Collection[Place]) -> None:
        """Remove what an earlier run left half made; of other writers' shards nothing is known here."""
        if isinstance(path, Path):
            artifacts.open_scratch(path, resume=True)
        if self.count == 1:
            shards.clear_except(artifacts.scratch_of(path), complete)
            return
        for one in mine:
            if one.path not in complete:
                places.remove(one.path)

    @contextlib.contextmanager
    def alone(self, path: Place) -> Iterator[None]:
        """One writer at a time completes a cache in a directory; in a bucket all would write the same bytes."""
        if self.count == 1 or not isinstance(path, Path):
            yield
            return
        file = path.with_name(path.name + ".lock")
        with open(file, "w") as opened:
            fcntl.flock(opened, fcntl.LOCK_EX)  # ends with the process, however that ends
            yield
            if artifacts.exists(path):
                file.unlink(missing_ok=True)

    def tell_missing(self, plans: Sequence[Plan], complete: Collection[Place]) -> None:
        """Say which shards other writers still have to make."""
        missing = [index for index, one in enumerate(plans) if one.path not in complete]
        log.info(
            "teacher_cache: this writer's %d shards are complete; %d of %d are still missing, of the writers %s. The "
            "one that ends last completes the cache; if all have ended, run any of them again",
            len(self.share(plans)[0]),
            len(missing),
            len(plans),
            ", ".join(str(writer) for writer in sorted({index % self.count for index in missing})),
        )
