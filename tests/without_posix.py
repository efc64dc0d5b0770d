"""Run before anything of ours: this process then lacks what Windows and macOS lack.

Modules, functions and signals are gone, folders cannot be opened, and no file that is open or mapped can be removed or
replaced, as on Windows. Libraries are imported first, because those of this system need some of it.
"""

from __future__ import annotations

import errno
import importlib
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

for library in ("torch.utils.tensorboard", "torchvision", "timm", "faiss", "safetensors.torch", "scipy.io", "jsonargparse"):
    importlib.import_module(library)

MODULES = ("resource", "fcntl", "pwd", "grp", "termios", "posix_ipc", "syslog")
SIGNALS = ("SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGKILL", "SIGSTOP")
FUNCTIONS = {
    os: (
        "getuid", "geteuid", "fork", "killpg", "statvfs", "O_DIRECTORY", "O_CLOEXEC", "O_NONBLOCK", "mkfifo", "posix_fadvise",
        "sched_getaffinity", "register_at_fork", "pread", "pwrite", "getloadavg", "uname", "nice",
    ),
    signal: ("sigwaitinfo", "pthread_sigmask", "alarm", *SIGNALS),
    socket: ("AF_UNIX",),
}  # fmt: skip


def in_use(path: Any) -> bool:
    """Whether this process has a file open, or mapped into memory."""
    real = os.path.realpath(path)
    descriptors = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
    return real in {os.readlink(each) for each in descriptors if os.path.lexists(each)} or any(
        line.endswith(f" {real}") for line in Path("/proc/self/maps").read_text().splitlines()
    )


def hide() -> None:
    """From here on this process is as poor as one on Windows."""
    room = shutil.disk_usage(".")
    shutil.disk_usage = lambda path: room  # type: ignore[assignment]  # Windows has it without statvfs
    for module in MODULES:
        sys.modules[module] = None  # type: ignore[assignment]  # its import fails
    for owner, names in FUNCTIONS.items():
        for name in names:
            if hasattr(owner, name):
                delattr(owner, name)
    for name in ("unlink", "remove", "replace", "rename"):
        setattr(os, name, _refusing_open_files(getattr(os, name)))
    tempfile.TemporaryFile = tempfile.NamedTemporaryFile  # type: ignore[misc,assignment]  # elsewhere removed while it is open
    opened = os.open

    def open_no_folder(path: Any, *arguments: Any, **options: Any) -> int:
        if not isinstance(path, int) and os.path.isdir(path) and "dir_fd" not in options:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    os.open = open_no_folder


def _refusing_open_files(change: Callable[..., None]) -> Callable[..., None]:
    def changed(*paths: Any, **options: Any) -> None:
        for path in paths:
            if not options and isinstance(path, str | Path) and os.path.isfile(path) and in_use(path):
                raise PermissionError(errno.EACCES, "it is being used by another process", str(path))
        change(*paths, **options)

    return changed


if __name__ == "__main__":
    hide()
    from dino_simpool import cli

    status = [cli.main(line.split()) for line in sys.stdin.read().splitlines()]
    print("ended with", *status)
