"""What a run does with stop signals."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from dino_simpool import signals
from dino_simpool.signals import KINDS, Stopped, job_ends_soon, stop_after_the_step, stop_at_once


@pytest.fixture(autouse=True)
def missed() -> Iterator[list[int]]:
    """Handlers that note what reaches them, so that a signal that is missed does not end the tests."""
    reached: list[int] = []
    before = {kind: signal.signal(kind, lambda number, frame: reached.append(number)) for kind in KINDS}
    yield reached
    for kind, handler in before.items():
        signal.signal(kind, handler)


def test_all_that_schedulers_and_terminals_send() -> None:
    assert {kind.name for kind in KINDS} == {"SIGINT", "SIGHUP", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2"}


def test_stop_signals_are_noted_and_handlers_come_back(missed: list[int]) -> None:
    """Each of them, the first Ctrl-C too; afterwards the process handles them as before."""
    handlers = [signal.getsignal(kind) for kind in KINDS]
    for place, kind in enumerate(KINDS):
        with stop_after_the_step() as stop:
            assert stop.strongest() == 0
            try:
                os.kill(os.getpid(), kind)
            except KeyboardInterrupt:
                pytest.fail("the first Ctrl-C did not wait for the step")
            assert stop.received == [kind] and stop.strongest() == 1 + place
    assert [signal.getsignal(kind) for kind in KINDS] == handlers and not missed


def test_a_request_to_requeue_counts_more_than_the_end() -> None:
    with stop_after_the_step() as stop:
        for kind in (signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), kind)
        assert KINDS[stop.strongest() - 1] == signal.SIGUSR2


def test_the_handler_of_before_is_called_after_the_step(missed: list[int]) -> None:
    """That of submitit requeues the job. Ours and Python's own for Ctrl-C would only raise."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with stop_at_once():
        signal.signal(signal.SIGUSR2, lambda number, frame: missed.append(100 + number))
        with stop_after_the_step() as stop:
            os.kill(os.getpid(), signal.SIGUSR2)
            assert not missed
            for kind in KINDS:
                stop.call_handler_before(kind)
            assert missed == [100 + signal.SIGUSR2]


@pytest.mark.parametrize("first", KINDS)
def test_ctrl_c_after_another_signal_stops_at_once(first: signal.Signals) -> None:
    before = [signal.getsignal(kind) for kind in KINDS]
    with pytest.raises(KeyboardInterrupt), stop_after_the_step() as stop:
        os.kill(os.getpid(), first)
        assert stop.received == [first]
        os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(kind) for kind in KINDS] == before


@pytest.mark.parametrize("way", [stop_after_the_step, stop_at_once])
def test_an_ignored_signal_stays_ignored(way: contextlib.AbstractContextManager) -> None:
    """As nohup asks for."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with way() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop is None or stop.received == []
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.mark.parametrize("kind", KINDS)
def test_other_commands_stop_at_once(kind: signal.Signals) -> None:
    with pytest.raises(Stopped, match=f"^stopped by {kind.name}$") as stopped, stop_at_once():
        os.kill(os.getpid(), kind)
    assert (stopped.value.number, stopped.value.step) == (kind, None) and not isinstance(stopped.value, Exception)


def test_a_signal_that_was_lost_before_the_loop_stops_it() -> None:
    with stop_at_once():
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), signal.SIGUSR2)
        with stop_after_the_step() as stop:
            assert stop.received == [signal.SIGUSR2]
    with stop_after_the_step() as stop:
        assert stop.received == []


def test_one_ctrl_c_that_children_receive_too_is_not_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they write to the same file. A second one that no handler answers ends the process."""
    monkeypatch.setattr(signals, "GRACE", 0.05)
    monkeypatch.setattr(os, "_exit", lambda status: ended.append(status))
    ended: list[int] = []
    before, threads = signal.set_wakeup_fd(-1), threading.active_count()
    with stop_after_the_step() as stop:
        writer = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(writer)
        os.kill(os.getpid(), signal.SIGINT)
        os.write(writer, bytes([signal.SIGINT, signal.SIGINT]))
        time.sleep(0.4)
        assert stop.received == [signal.SIGINT] and not ended
        os.write(writer, bytes([signal.SIGINT]))  # a second one, which no handler is called for
        time.sleep(0.4)
        assert ended == [130]
    assert signal.set_wakeup_fd(before) == before and threading.active_count() == threads


def test_another_thread_receives_none() -> None:
    """Python lets only the main thread handle signals; elsewhere the list stays empty."""
    noted = []

    def work() -> None:
        with stop_at_once(), stop_after_the_step() as stop:
            noted.append(list(stop.received))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert noted == [[]]


def test_the_end_of_a_slurm_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert not job_ends_soon(1e9)
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 100))
    assert job_ends_soon(110) and not job_ends_soon(90)
