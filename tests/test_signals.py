"""What a run does with stop signals."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from dino_simpool.signals import stop_signals

KINDS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[list[int]]:
    """Handlers that note what reaches them, so that a signal that is missed does not end the tests."""
    missed: list[int] = []
    before = {kind: signal.signal(kind, lambda number, frame: missed.append(number)) for kind in KINDS}
    yield missed
    for kind, handler in before.items():
        signal.signal(kind, handler)


def test_stop_signals_are_noted_and_handlers_come_back() -> None:
    """Each of the four, the first Ctrl-C too; afterwards the process handles them as before."""
    before = [signal.getsignal(kind) for kind in KINDS]
    for kind in KINDS:
        with stop_signals() as received:
            try:
                os.kill(os.getpid(), kind)
            except KeyboardInterrupt:
                pytest.fail("the first Ctrl-C did not wait for the step")
            assert received == [kind]
    with stop_signals() as received:
        for kind in KINDS[:3]:
            os.kill(os.getpid(), kind)
        assert received == list(KINDS[:3])
    assert [signal.getsignal(kind) for kind in KINDS] == before


@pytest.mark.parametrize("first", KINDS)
def test_ctrl_c_after_another_signal_stops_at_once(first: signal.Signals) -> None:
    before = [signal.getsignal(kind) for kind in KINDS]
    with pytest.raises(KeyboardInterrupt), stop_signals() as received:
        os.kill(os.getpid(), first)
        assert received == [first]
        os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(kind) for kind in KINDS] == before


def test_another_thread_receives_none() -> None:
    """Python lets only the main thread handle signals; elsewhere the list stays empty."""
    noted = []

    def work() -> None:
        with stop_signals() as received:
            noted.append(list(received))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert noted == [[]]
