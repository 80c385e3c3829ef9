"""Follows a promotion: when the address of the served draft leads to another one, the server takes that over."""

import logging
import signal
import threading
from collections.abc import Callable

from pipeline.errors import PipelineError
from pipeline.serve.replaceable_engine import ReplaceableEngine
from pipeline.serve.served_engine import ServedEngine

log = logging.getLogger("pipeline")


class DraftWatch:
    """Looks where the draft's address leads, on SIGHUP and every `poll_seconds` (None: on SIGHUP alone).

    `find` returns what identifies the draft and a function that loads it into a warm engine. A draft that cannot be
    found or loaded is logged, and the server goes on with the present one.
    """

    def __init__(
        self,
        engine: ReplaceableEngine,
        present: str,
        find: Callable[[], tuple[str, Callable[[], ServedEngine]]],
        poll_seconds: float | None,
    ) -> None:
        self._engine, self._present, self._find, self._poll_seconds = engine, present, find, poll_seconds
        self._asked, self._ended = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="draft watch", daemon=True)

    def start(self) -> None:
        """Starts to watch; called from the main thread, which alone can take a signal."""
        signal.signal(signal.SIGHUP, lambda number, frame: self._asked.set())
        self._thread.start()

    def stop(self) -> None:
        """Ends watching; a draft that is being loaded is not waited for."""
        self._ended = True
        self._asked.set()

    def look(self) -> bool:
        """Takes over another draft, if the address leads to one; returns whether it did."""
        try:
            found, load = self._find()
            if found == self._present:
                return False
            log.info("serve: the draft's address leads to another one; it is loaded beside the present one")
            self._engine.replace(load())
        except PipelineError as error:
            log.error("serve: the draft stays as it is: %s", error)
            return False
        self._present = found
        log.info("serve: requests have the new draft from now on")
        return True

    def _run(self) -> None:
        while True:
            self._asked.wait(self._poll_seconds)
            self._asked.clear()
            if self._ended:
                return
            self.look()
