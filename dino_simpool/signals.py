"""Handles stop signals of schedulers and terminals."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list of the stop signals received so far.

    The loop saves at the next step, never the handler. A second SIGINT (Ctrl-C) stops at once.
    """
    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        if number == signal.SIGINT and received:
            raise KeyboardInterrupt
        received.append(number)

    kinds = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
    if threading.current_thread() is not threading.main_thread():  # Python handles signals there only
        yield received
        return
    before = {kind: signal.signal(kind, handle) for kind in kinds}
    try:
        yield received
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
