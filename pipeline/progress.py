"""Shows the progress of long work, with a rate and the time that is left."""

import logging
import sys
import time
from types import TracebackType

import tqdm

log = logging.getLogger("pipeline")

LINE_INTERVAL_SECONDS = 10.0
BYTES = "B"
MIB, GIB = 2**20, 2**30


def binary_amount(count: int | float) -> str:
    """Returns `count` with the unit prefix of a power of 1024: 1.50G."""
    return tqdm.tqdm.format_sizeof(count, divisor=1024)


class Progress:
    """Counts `total` units of work: one rewritten line on a terminal, else a log line every ten seconds.

    `done` units were completed by an earlier run that was interrupted; they do not count in the rate. The unit "B"
    is shown in KiB, MiB and so on. Without `is_shown` nothing is shown.
    """

    def __init__(self, description: str, total: int, unit: str, *, done: int = 0, is_shown: bool = True) -> None:
        self._description = description
        self._total = total
        self._unit = unit
        self._initial = self._done = done
        self._note = ""
        self._is_shown = is_shown
        self._bar: tqdm.tqdm | None = None
        self._started = self._last_shown = time.monotonic()

    def __enter__(self) -> "Progress":
        self._started = self._last_shown = time.monotonic()
        if self._is_shown and sys.stderr.isatty():
            self._bar = tqdm.tqdm(
                desc=self._description,
                total=self._total,
                unit=self._unit,
                unit_scale=self._unit == BYTES,
                unit_divisor=1024 if self._unit == BYTES else 1000,
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
            self._log_line(time.monotonic())

    def advance(self, count: int = 1, note: str = "") -> None:
        """Counts `count` more units as done; `note` (a loss, say) is shown with them."""
        self._done += count
        self._note = note or self._note
        if self._bar is not None:
            self._bar.set_postfix_str(self._note, refresh=False)
            self._bar.update(count)
            return
        now = time.monotonic()
        if now - self._last_shown >= LINE_INTERVAL_SECONDS and self._done < self._total:
            self._log_line(now)

    def _log_line(self, now: float) -> None:
        if not self._is_shown:
            return
        self._last_shown = now
        elapsed = now - self._started
        new = self._done - self._initial
        rate = new / elapsed if elapsed > 0 else 0.0
        if self._done < self._total and rate > 0:
            when = f"{tqdm.tqdm.format_interval((self._total - self._done) / rate)} left"
        else:
            when = f"in {tqdm.tqdm.format_interval(elapsed)}"
        note = f", {self._note}" if self._note else ""
        unit = "iB" if self._unit == BYTES else f" {self._unit}"
        log.info(
            "%s: %s/%s%s, %s%s/s, %s%s",
            self._description,
            *(self._amount(count) for count in (self._done, self._total)),
            unit,
            self._amount(rate),
            unit,
            when,
            note,
        )

    def _amount(self, count: int | float) -> str:
        if self._unit == BYTES:
            return binary_amount(count)
        return f"{count}" if isinstance(count, int) else f"{count:.3g}"
