"""Lets Ctrl-C act between two training steps instead of within one.

Within a step the old state is donated and the new one not there yet; EasyDeL's loop catches the interrupt and
then fails on arrays that were deleted.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def between_steps() -> Iterator[Callable[[], None]]:
    """Holds SIGINT and SIGTERM back; yields a function that raises KeyboardInterrupt once one has come.

    A second signal acts at once, as it would have without this. Signals that were ignored stay ignored.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread handles signals
        yield lambda: None
        return
    came = False
    before = {number: signal.getsignal(number) for number in SIGNALS}
    held = [number for number, handler in before.items() if handler is not signal.SIG_IGN]

    def restore() -> None:
        for number in held:
            signal.signal(number, before[number])

    def hold(number: int, frame: Any) -> None:
        nonlocal came
        came = True
        restore()

    def check() -> None:
        if came:
            raise KeyboardInterrupt

    for number in held:
        signal.signal(number, hold)
    try:
        yield check
    finally:
        restore()
    check()
