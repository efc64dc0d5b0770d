"""Files that are written as a whole or not at all, and their digests."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk, and rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with full_disk_named(path):
            write(temporary)
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(temporary, 0o666 & ~mask)  # safetensors writes files that only their owner can read
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextlib.contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """OSError that names file and disk in place of what libraries raise when the disk is full.

    torch raises a RuntimeError, safetensors an error of its own, and neither says which file.
    """
    try:
        yield
    except Exception as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
        if not full and not ("PytorchStreamWriter failed" in str(error) and free < 2**20):
            raise
        raise OSError(
            f"cannot write {path}: the disk is full ({free:,} bytes are free, or a quota is used up). What was there before "
            "is still valid; make room and run the same command again"
        ) from error


def sync_folder(folder: Path) -> None:
    """Flush a folder to the disk. Without it, a power cut may lose the new names of files in it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically. ValueError for NaN, before anything is written."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write_text(text))


def make_writable(folder: Path, option: str) -> Path:
    """Make a folder and try to write there. ValueError, naming the option, if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise ValueError(f"cannot write to {folder} ({error.strerror}): give another {option}") from None


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
