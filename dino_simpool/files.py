"""Files that are written as a whole or not at all, and their digests."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any


def write_atomically(path: Path, write: Callable[[Path], object], *, flush: bool = True) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk, and rename it.

    flush: False for one of many files that can be made again: a power cut may leave it empty.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with full_disk_named(path):
            write(temporary)
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(temporary, 0o666 & ~mask)  # safetensors writes files that only their owner can read
            if flush:
                with open(temporary, "rb+") as file:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
    except OSError as error:
        if error.filename == str(temporary):  # which nobody knows
            error.filename = str(path)
        raise
    finally:
        with contextlib.suppress(OSError):  # it has its name, or nothing can be changed here any more
            temporary.unlink()
    if flush:
        sync_folder(path.parent)


@contextlib.contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """OSError that names file and disk in place of what libraries raise when the disk is full.

    torch and safetensors raise errors of their own, numpy an OSError without a number, and hardly
    one names the file. So where no number says what is wrong, a probe tells whether the disk is.
    """
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None)
        if number not in _FULL and (number is not None or not _is_full(path.parent)):
            raise
        free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
        raise OSError(
            f"cannot write {path}: the disk is full ({free:,} bytes are free, or a quota is used up). What was there before "
            "is still valid; make room and run the same command again"
        ) from error


_FULL = (errno.ENOSPC, errno.EDQUOT)


def _is_full(folder: Path) -> bool:
    """Whether a MiB cannot be written there for want of room."""
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(2**20))
            probe.flush()
    except OSError as error:
        return error.errno in _FULL
    return False


def sync_folder(folder: Path) -> None:
    """Flush a folder to the disk. Without it, a power cut may lose the new names of files in it.

    Windows opens no folder, and some network file systems flush none: there the files must do.
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


_SEEKING = threading.Lock()
"""Held while a file that threads share is moved to a place: Windows has no pread and no pwrite."""


def read_at(file: int, size: int, place: int) -> bytes:
    """`size` bytes of an open file from a place on, fewer at its end. Threads may share it."""
    if hasattr(os, "pread"):
        return os.pread(file, size, place)
    with _SEEKING:
        os.lseek(file, place, os.SEEK_SET)
        return os.read(file, size)


def write_at(file: int, data: bytes | memoryview, place: int) -> int:
    """Write to an open file from a place on; the number of bytes written, perhaps not all. Threads
    may share it."""
    if hasattr(os, "pwrite"):
        return os.pwrite(file, data, place)
    with _SEEKING:
        os.lseek(file, place, os.SEEK_SET)
        return os.write(file, data)


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


Fields = dict[str, type | tuple[type, ...]]
"""Dotted names of fields, and of which type they are. A name that ends in "?" may be missing or
None, and with it what is below."""
NUMBER = (int, float)


def read_json(path: str | Path, fields: Fields, *, what: str, remedy: str) -> dict[str, Any]:
    """The JSON object in a file, with these fields. Other fields may be there too.

    what, remedy: of the ValueError for a file that is none, as in "PATH is not WHAT (reason):
    REMEDY". OSError if the file cannot be opened.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON, so it is not {what} ({str(error)[:200]}): {remedy}") from None
    return require_fields(value, fields, path=path, what=what, remedy=remedy)


def require_fields(value: Any, fields: Fields, *, path: str | Path, what: str, remedy: str) -> dict[str, Any]:
    """The value, if it is a dict with these fields. ValueError as for `read_json`."""
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not {what} (it is a {type(value).__name__}, not an object with fields): {remedy}")
    for name, kind in fields.items():
        part: Any = value
        for key in name.split("."):
            optional = key.endswith("?")
            part = part.get(key.removesuffix("?")) if isinstance(part, dict) else None
            if part is None:
                break
        if part is None and not optional:
            raise ValueError(f"{path} is not {what} (it has no {name.replace('?', '')}): {remedy}")
        if part is not None and (not isinstance(part, kind) or (isinstance(part, bool) and kind is not bool)):
            wanted = " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
            raise ValueError(f"{path} is not {what} (its {name.replace('?', '')} is no {wanted}): {remedy}")
    return value


def digests_of(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The SHA-256 of files of a folder, by name, for the JSON file beside them."""
    return {name: file_sha256(folder / name) for name in names}


def check_digest(path: Path, digests: dict[str, Any] | None, *, remedy: str) -> str:
    """What to say of a file that the JSON file beside it knows no digest of, as in version 0.1; ""
    if it has its digest. ValueError if its digest is another one."""
    if not digests or path.name not in digests:
        return f"{path} is of version 0.1 or of another tool and has no checksum: whether it is undamaged was not checked"
    if file_sha256(path) != digests[path.name]:
        raise ValueError(f"{path} is damaged or was changed: it does not match the checksum that was stored with it; {remedy}")
    return ""
