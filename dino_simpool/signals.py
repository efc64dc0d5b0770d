"""Signals of schedulers and terminals that ask a training to stop."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that fills with the signals that ask the run to stop; the loop saves at the next step, never the handler."""
    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        if number == signal.SIGINT and received:  # asked a second time: at once
            raise KeyboardInterrupt
        received.append(number)

    kinds = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
    if threading.current_thread() is not threading.main_thread():  # Python takes signals in its main thread only
        yield received
        return
    before = {kind: signal.signal(kind, handle) for kind in kinds}
    try:
        yield received
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
