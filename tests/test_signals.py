"""What a run does with stop signals."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from dino_simpool.signals import stop_signals

KINDS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


def test_stop_signals_are_noted_and_handlers_come_back() -> None:
    """Each of the four, the first Ctrl-C too; afterwards the process handles them as before."""
    before = [signal.getsignal(kind) for kind in KINDS]
    for kind in KINDS:
        with stop_signals() as received:
            os.kill(os.getpid(), kind)
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
