"""Stop signals of schedulers and terminals, and the exception for a run that they ended early."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

# Windows has only two of these. If several arrive, the last one in this order counts: schedulers
# send TERM beside the USR1 or USR2 by which a job asks to be told of its end, and to be requeued.
KINDS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGHUP", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)
"""The signals that ask a process to stop."""
GRACE = 5.0
"""Seconds for the handler of a second Ctrl-C, before the process is ended without it."""


class Stopped(KeyboardInterrupt):
    """A signal stopped a command before its end. The exit status is 128 + its number.

    number: of the signal.   step: optimizer steps that are done and saved; None where there are
    none.   Not an Exception: `except Exception` around a run must not take it for a failure.
    """

    def __init__(self, number: int, step: int | None = None, total: int | None = None) -> None:
        where = "" if step is None else f" after step {step} of {total}"
        super().__init__(f"stopped by {signal.Signals(number).name}{where}")
        self.number, self.step = number, step


class StopAfterStep:
    """The stop signals received so far, and the handlers that they would have reached."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self.before: dict[int, Callable[[int, FrameType | None], object]] = {}

    def strongest(self) -> int:
        """Place in KINDS of the signal that counts, from 1 on; 0 if none was received."""
        return max((1 + KINDS.index(number) for number in self.received), default=0)

    def call_handler_before(self, number: int) -> None:
        """What a signal would have done, now that the state is saved.

        submitit requeues its job in its handler, and does not return from it.
        """
        if number in self.before:
            self.before[number](number, None)


@contextlib.contextmanager
def stop_after_the_step() -> Iterator[StopAfterStep]:
    """Note stop signals for a loop that looks for them at each step; it saves, never the handler.

    A second signal that is Ctrl-C stops at once, also where the main thread waits for a process
    that hangs (see _ended_by_ctrl_c). Where Python handles no signals, in other threads than the
    main one, none is noted. A signal that is ignored (nohup) stays so.
    """
    stop = StopAfterStep()
    stop.received += _raised  # and was lost

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and stop.received:
            raise KeyboardInterrupt
        stop.received.append(number)

    with _handled_by(handle) as before, _ended_by_ctrl_c() if before else contextlib.nullcontext():
        ours = (_raise, signal.default_int_handler)
        stop.before = {kind: handler for kind, handler in before.items() if callable(handler) and handler not in ours}
        yield stop


@contextlib.contextmanager
def _ended_by_ctrl_c() -> Iterator[None]:
    """End the process GRACE seconds after a second Ctrl-C that no handler could answer.

    Python calls handlers between its own instructions, so never while the main thread waits inside
    of torch for another process. But it writes each signal to a file at once, which a thread reads.
    """
    if not hasattr(signal, "SIGQUIT"):  # Windows, where there are no other processes to wait for
        yield
        return
    over = threading.Event()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch() -> None:
        count, last = 0, -math.inf
        while not over.is_set() and count < 2:
            if signal.SIGINT in os.read(reader, 64) and time.monotonic() - last > 0.3:
                # A terminal sends it to our child processes too, which have the same file when they
                # begin: what comes at the same time is one.
                count, last = count + 1, time.monotonic()
        if not over.wait(GRACE):
            said = "stopped by a second SIGINT while it waits for another process: run the same command again to resume"
            print(said, file=sys.stderr, flush=True)
            os._exit(128 + signal.SIGINT)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        over.set()
        os.write(writer, b"\0")
        thread.join()
        os.close(reader)
        os.close(writer)


def job_ends_soon(margin: float) -> bool:
    """Whether the SLURM job of this process ends within `margin` seconds.

    For schedulers that send no signal before they kill. SLURM sets the variable, but 22.05 does not
    yet; `submit` does so too.
    """
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    return end.isdigit() and time.time() > int(end) - margin


@contextlib.contextmanager
def stop_at_once() -> Iterator[None]:
    """Raise Stopped in the main thread at a stop signal, unless it is ignored (nohup)."""
    try:
        with _handled_by(_raise):
            yield
    finally:
        _raised.clear()


_raised: list[int] = []
"""Signals for which `stop_at_once` has raised an exception since it began."""


def _raise(number: int, frame: FrameType | None) -> None:
    _raised.append(number)
    raise Stopped(number)


def raise_again() -> None:
    """Stopped, if a signal has raised it before: modules in C may lose it while they are
    imported."""
    if _raised:
        raise Stopped(_raised[-1])


@contextlib.contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], object]) -> Iterator[dict[int, object]]:
    """Install a handler for all kinds; gives those of before, which come back at the end."""
    before: dict[int, object] = {}
    if threading.current_thread() is threading.main_thread():
        before = {kind: signal.getsignal(kind) for kind in KINDS}
        # None: a handler that C code installed. It could not be put back.
        before = {kind: old for kind, old in before.items() if old is not None and old != signal.SIG_IGN}
    for kind in before:
        signal.signal(kind, handler)
    try:
        yield before
    finally:
        for kind, old in before.items():
            signal.signal(kind, old)  # type: ignore[arg-type]
