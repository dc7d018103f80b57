"""Signals: the first ends the work at its next boundary, the second ends it at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

CLEARING_SECONDS = 2.0  # in which a further Ctrl-C is not heard
STOPPING = "stopping at the next step, and saving the state; a second signal ends at once, with the state saved before"


def raising(error: BaseException) -> Callable[[int, object], None]:
    """A signal handler that raises this error, but not again at once: many presses of Ctrl-C would cut off the clearing
    up, and the line that says what is kept."""
    last = float("-inf")

    def handle(_number: int, _frame: object) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > CLEARING_SECONDS:
            last = now
            raise error

    return handle


def stop_on_signals(first: str = "") -> threading.Event:
    """An event that SIGINT and SIGTERM set, so that work ends at its next boundary; a second signal kills.

    first: a line for the first signal, of work that saves its state; its second one is a KeyboardInterrupt.
    """
    stop, interrupt = threading.Event(), raising(KeyboardInterrupt())

    def handle(number: int, frame: object) -> None:
        if first and stop.is_set():
            interrupt(number, frame)
            return
        stop.set()
        if not first:
            signal.signal(number, signal.SIG_DFL)
        elif os.environ.get("RANK", "0") == "0":
            begin = "\n" if sys.stderr.isatty() else ""  # below the progress bar
            with suppress(OSError):
                os.write(2, f"{begin}dfmcl: {first}\n".encode())  # print() may be what the signal interrupted

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    return stop
