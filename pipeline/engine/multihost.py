"""An engine over several hosts: the first one takes requests, the others do what it does, step by step."""

import dataclasses
from typing import Any

from pipeline import hosts
from pipeline.serve.engine import Engine, Update
from pipeline.serve.scheduler import Request

ADD, CANCEL, WAIT, END = "add", "cancel", "wait", "end"


class LeadingEngine(Engine):
    """The first host's engine. From `lead` on, every step tells the other hosts what was asked since the last one.

    Before, all hosts drive their engines alike (to warm up).
    """

    _leads = False

    def lead(self) -> None:
        """From now on the other hosts are in `follow`."""
        self._asked: list[list[Any]] = []
        self._leads = True

    def add(self, request: Request) -> None:
        """As `Engine.add`, on all hosts."""
        super().add(request)
        if self._leads:
            self._asked.append([ADD, dataclasses.asdict(request)])

    def cancel(self, request_id: str) -> None:
        """As `Engine.cancel`, on all hosts."""
        super().cancel(request_id)
        if self._leads:
            self._asked.append([CANCEL, request_id])

    def step(self) -> list[Update]:
        """As `Engine.step`, on all hosts."""
        if self._leads:
            hosts.told_by_first(self._asked)
            self._asked = []
        return super().step()

    def keep_waiting(self) -> None:
        """Tell the others that there is nothing to do: what waits too long for word gives up."""
        hosts.told_by_first([*self._asked, [WAIT, None]])
        self._asked = []

    def end(self) -> None:
        """Send the others home."""
        hosts.told_by_first([[END, None]])


def follow(engine: Engine) -> None:
    """Do what the first host's engine does until it ends."""
    while True:
        asked = hosts.told_by_first(None)
        for what, value in asked:
            if what == ADD:
                key = value["key"] and tuple(value["key"])
                engine.add(Request(**{**value, "prompt_ids": tuple(value["prompt_ids"]), "key": key}))
            elif what == CANCEL:
                engine.cancel(value)
            elif what == END:
                return
        if not asked or asked[-1][0] != WAIT:
            engine.step()
