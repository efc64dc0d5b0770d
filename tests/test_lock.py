"""The lock of a run's folder."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dino_simpool import lock as lock_module
from dino_simpool.lock import locked

HOLDER = """
import sys, time
from pathlib import Path
from dino_simpool.lock import locked
with locked(Path(sys.argv[1])):
    print("holds", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process of this machine that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "holds\n"
    yield process
    process.kill()
    process.wait()


def left_by(folder: Path, *, age: float = 0.0, **record: Any) -> None:
    """A lock file as another host leaves it."""
    file = folder / "run.lock"
    file.write_text(json.dumps({"host": "elsewhere", "process": 5, "job": None, "started": "today", "run": "x"} | record))
    os.utime(file, (time.time() - age,) * 2)


def test_a_second_run_of_this_machine_is_refused_while_the_first_lives(
    tmp_path: Path, other: subprocess.Popen[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the same SLURM job, of which two steps may run at once. Killed, it is replaced without waiting."""
    for job in (None, "7"):
        if job:
            monkeypatch.setenv("SLURM_JOB_ID", job)
            record = json.loads((tmp_path / "run.lock").read_text())
            (tmp_path / "run.lock").write_text(json.dumps(record | {"job": job}))
        with pytest.raises(BlockingIOError, match=f"process {other.pid} on {socket.gethostname()}, started .* works in"):
            with locked(tmp_path):
                pytest.fail("two at once")
    other.kill()
    other.wait()
    with locked(tmp_path) as lock:
        assert json.loads((tmp_path / "run.lock").read_text())["process"] == os.getpid() and not lock.lost()
    assert f"the run of process {other.pid} on {socket.gethostname()} was killed" in capsys.readouterr().err
    assert not (tmp_path / "run.lock").exists()


@pytest.mark.parametrize(
    ("age", "job", "free"), [(0, None, False), (299, None, False), (301, None, True), (0, "7", True), (0, "8", False)]
)
def test_the_lock_of_another_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, age: float, job: str | None, free: bool
) -> None:
    """Stale after five minutes without renewal, at once if it is of our own SLURM job (which was requeued)."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    left_by(tmp_path, age=age, job="7")
    if job:
        monkeypatch.setenv("SLURM_JOB_ID", job)
    if free:
        with locked(tmp_path):
            assert json.loads((tmp_path / "run.lock").read_text())["host"] == socket.gethostname()
        return
    with pytest.raises(BlockingIOError, match=r"process 5 on elsewhere, started today, works in .* try again in 5 minutes"):
        with locked(tmp_path):
            pytest.fail("two at once")
    assert json.loads((tmp_path / "run.lock").read_text())["host"] == "elsewhere"


def test_a_broken_lock_file_of_nobody_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "run.lock").write_bytes(b"\xff{")
    with locked(tmp_path) as lock:
        assert not lock.lost()


def test_it_is_renewed_until_it_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "RENEW", 0.02)
    before = threading.active_count()
    with locked(tmp_path) as lock:
        file = tmp_path / "run.lock"

        def renewed() -> bool:
            os.utime(file, (1, 1))
            end = time.monotonic() + 5
            while file.stat().st_mtime == 1 and time.monotonic() < end and not lock.lost():
                time.sleep(0.01)
            return file.stat().st_mtime != 1

        assert renewed()
        left_by(tmp_path)
        assert lock.lost() and not renewed()
    assert json.loads(file.read_text())["host"] == "elsewhere"  # it is not ours to remove
    end = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.01)
    assert threading.active_count() == before


@pytest.mark.parametrize("how", ["removed", "moved"])
def test_it_is_lost_with_its_folder(tmp_path: Path, how: str) -> None:
    with locked(tmp_path) as lock:
        (tmp_path / "run.lock").unlink() if how == "removed" else (tmp_path / "run.lock").rename(tmp_path / "old")
        assert lock.lost()
    with locked(tmp_path):
        pass
