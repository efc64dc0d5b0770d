"""One run at a time in a folder: OUT/run.lock says which process of which host works there.

On one machine the operating system knows whether the holder lives. Between machines nothing does,
so the holder renews the file every minute, and a file that was not renewed for five is of a run
that was killed. What SLURM requeues has the number of the job that it was, and goes on at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: there only the times of the file count
    fcntl = None  # type: ignore[assignment]

from dino_simpool.files import full_disk_named, read_at, write_at
from dino_simpool.logs import say

RENEW = 60.0
"""Seconds between renewals."""
STALE = 300.0
"""Seconds without a renewal after which the run of another host is taken for dead."""


class Lock:
    """The open lock file of this process, and what it wrote there."""

    def __init__(self, path: Path, file: int, record: dict[str, Any]) -> None:
        self.path, self.file, self.record = path, file, record

    def lost(self) -> bool:
        """Whether another run has taken the folder since, or the folder was removed."""
        return _read(self.file) != self.record or not _is_at(self.file, self.path)

    def renew_until(self, end: threading.Event) -> None:
        """Set the time of the file once a minute."""
        while not end.wait(RENEW):
            with contextlib.suppress(OSError):
                if not self.lost():
                    os.utime(self.path)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[Lock]:
    """Hold a folder. BlockingIOError, which names the other run, if one works there."""
    path, end, ours = folder / "run.lock", threading.Event(), False
    file, free = _open(path)
    try:
        other = _read(file)
        if other is not None or not free:
            _refuse_if_alive(other or {}, file, folder, free=free)
        record = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "job": os.environ.get("SLURM_JOB_ID"),
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
            "run": os.urandom(8).hex(),
        }
        os.ftruncate(file, 0)
        with full_disk_named(path):
            write_at(file, json.dumps(record).encode() + b"\n", 0)
        lock = Lock(path, file, record)
        threading.Thread(target=lock.renew_until, args=(end,), daemon=True).start()
        try:
            yield lock
        finally:
            ours = not lost_to_another(lock)
            if ours and fcntl is not None:
                path.unlink()
    finally:
        end.set()
        os.close(file)
        if ours and fcntl is None:  # Windows removes no file that is open
            path.unlink()


def lost_to_another(lock: Lock) -> bool:
    """As `Lock.lost`, also where the file system is gone."""
    try:
        return lock.lost()
    except OSError:
        return True


def _open(path: Path) -> tuple[int, bool]:
    """The lock file, and whether no living process holds it.

    The lock of the operating system ends with its process, however that ends, and does not pass to
    loader processes. A file that its last holder removed before we had the lock is no longer it.
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        free = True
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            free = False
        except OSError as error:  # some network file systems have no locks
            say(f"warning: {error.strerror}: only the time of {path} tells whether another run works there")
        if _is_at(file, path):
            return file, free
        os.close(file)


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _read(file: int) -> dict[str, Any] | None:
    try:
        record = json.loads(read_at(file, 4096, 0))
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _refuse_if_alive(other: dict[str, Any], file: int, folder: Path, *, free: bool) -> None:
    """BlockingIOError unless the run of a lock file is dead. free: nobody holds the file itself."""
    here = other.get("host") == socket.gethostname() and fcntl is not None
    job = os.environ.get("SLURM_JOB_ID")
    if not here and job and other.get("job") == job:
        say(f"{folder}: going on after {other.get('host')}, in the same SLURM job {job}")
        return
    if free and (here or _age(file, folder) > STALE):
        say(f"{folder}: the run of process {other.get('process')} on {other.get('host')} was killed")
        return
    who = f"process {other['process']} on {other['host']}, started {other['started']}" if other else "another run"
    advice = "" if here else f"; if it was killed, try again in {STALE / 60:.0f} minutes"
    raise BlockingIOError(f"{who}, works in {folder}: stop it first, or give another run.out{advice}")


def _age(file: int, folder: Path) -> float:
    """Seconds since the last renewal by the clock of the file server, which may not be ours."""
    probe = folder / f".run.lock.{os.getpid()}.probe"
    try:
        probe.write_bytes(b"")
        return probe.stat().st_mtime - os.fstat(file).st_mtime
    finally:
        probe.unlink(missing_ok=True)
