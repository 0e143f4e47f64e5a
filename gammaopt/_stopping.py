"""The order to stop, given by a signal. Imports nothing else, so that a process can be asked from its first second."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stopping:
    """Whether this process was told to stop. No threading.Event: one that is set in a signal handler can deadlock."""

    def __init__(self) -> None:
        self.told = False

    def tell(self, *_: object) -> None:
        """Ask for the stop; fit to be a signal handler."""
        self.told = True

    def wait(self, seconds: float) -> bool:
        """Sleep, but not beyond the order to stop; returns whether there is one."""
        end = time.monotonic() + seconds
        while not self.told and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.05))
        return self.told


@contextmanager
def asked_by(signals: tuple[signal.Signals, ...]) -> Iterator[Stopping]:
    """What these signals ask for meanwhile. Only the main thread can be asked."""
    stopping = Stopping()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    before = {number: signal.signal(number, stopping.tell) for number in signals}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
