"""Progress of long work, with a rate and the time that is left."""

import logging
import sys
import time
from types import TracebackType

import tqdm

log = logging.getLogger("pipeline")

LINE_INTERVAL_SECONDS = 10.0


class Progress:
    """Counts `total` units of work: one rewritten line on a terminal, else a log line every ten seconds.

    `done` units were made by an earlier run that was interrupted; they do not count in the rate.
    """

    def __init__(self, description: str, total: int, unit: str, *, done: int = 0) -> None:
        self._description = description
        self._total = total
        self._unit = unit
        self._initial = self._done = done
        self._note = ""
        self._bar: tqdm.tqdm | None = None
        self._started = self._told = time.monotonic()

    def __enter__(self) -> "Progress":
        self._started = self._told = time.monotonic()
        if sys.stderr.isatty():
            self._bar = tqdm.tqdm(
                desc=self._description,
                total=self._total,
                unit=self._unit,
                initial=self._initial,
                dynamic_ncols=True,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._done > self._initial:
            self._tell(time.monotonic())

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count `count` more units as done; `note` (a loss, say) is shown with them."""
        self._done += count
        self._note = note or self._note
        if self._bar is not None:
            self._bar.set_postfix_str(self._note, refresh=False)
            self._bar.update(count)
            return
        now = time.monotonic()
        if now - self._told >= LINE_INTERVAL_SECONDS and self._done < self._total:
            self._tell(now)

    def _tell(self, now: float) -> None:
        self._told = now
        elapsed = now - self._started
        made = self._done - self._initial
        rate = made / elapsed if elapsed > 0 else 0.0
        if self._done < self._total and rate > 0:
            when = f"{tqdm.tqdm.format_interval((self._total - self._done) / rate)} left"
        else:
            when = f"in {tqdm.tqdm.format_interval(elapsed)}"
        note = f", {self._note}" if self._note else ""
        log.info(
            "%s: %d/%d %s, %.3g %s/s, %s%s",
            self._description,
            self._done,
            self._total,
            self._unit,
            rate,
            self._unit,
            when,
            note,
        )
