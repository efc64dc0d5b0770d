"""A large .npy file that several processes fill, block by block. It survives a kill at any point.

    NAME.partial.npy           during the work: the array at full size, zeros for missing rows
    NAME.progress_0.json ...   per process: the blocks on the disk, as [[first, last + 1], ...]
    NAME.npy                   afterwards, in place of the others

Rows are flushed to the disk before the record that names them. So a recorded block survives even a
power cut, and any process computes the other blocks again. Rows are written at their place in the
file, not through a memory map: a full disk is then an error instead of a crash, and machines that
share the file never overwrite each other's part of a page.

M rows in blocks of `block`, the last one smaller; one process writes a block as a whole.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import time
from pathlib import Path

import numpy as np

from dino_simpool.files import full_disk_named, sync_folder, write_at, write_atomically

SAVE_SECONDS = 10.0
"""Seconds of work of a process that a kill can cost."""


class RowFile:
    """A float32 array of `shape` (M, ...) at `path`. As a context manager, it is open for `write`,
    and saved at the end."""

    def __init__(self, path: Path, shape: tuple[int, ...], *, block: int, rank: int = 0) -> None:
        self.path, self.shape, self.block = path, shape, block
        self.partial = path.with_suffix(".partial.npy")
        self.row_bytes = 4 * math.prod(shape[1:])
        self._record = path.with_suffix(f".progress_{rank}.json")
        self._written: list[list[int]] = []
        self._file, self._offset, self._saved = -1, 0, 0.0

    @property
    def finished(self) -> bool:
        """Whether the file exists, with every row."""
        return self.path.exists()

    def missing_bytes(self) -> int:
        """Bytes of disk space that are still needed to finish the file."""
        held = self.partial.stat() if self.partial.exists() else None
        there = 0 if held is None else held.st_blocks * 512 if hasattr(held, "st_blocks") else held.st_size  # Windows
        return 0 if self.finished else max(0, self.shape[0] * self.row_bytes - there)

    def create(self) -> None:
        """Start over, with no row written. One process calls it, before any opens the file."""
        self.forget()
        write_atomically(self.partial, lambda path: np.lib.format.open_memmap(path, "w+", np.float32, self.shape).flush())

    def remaining(self) -> np.ndarray:
        """Numbers of the blocks that no process has recorded, ascending."""
        done = np.zeros(-(-self.shape[0] // self.block), bool)
        for record in self._records():
            for first, stop in json.loads(record.read_text()):
                done[first:stop] = True
        return np.flatnonzero(~done)

    def rows_of(self, blocks: np.ndarray) -> np.ndarray:
        """The numbers of the rows in these blocks."""
        rows = (blocks[:, None] * self.block + np.arange(self.block)).reshape(-1)
        return rows[rows < self.shape[0]]

    def write(self, block: int, rows: np.ndarray) -> None:
        """Write the rows (up to `block`, ...) of one block. They are recorded every SAVE_SECONDS,
        and at the end."""
        assert rows.shape == (len(self.rows_of(np.array([block]))), *self.shape[1:]), f"rows {rows.shape} of {self.shape}"
        data = memoryview(rows.astype(np.float32).tobytes())
        place = self._offset + block * self.block * self.row_bytes
        with full_disk_named(self.partial):
            while data:
                count = write_at(self._file, data, place)
                data, place = data[count:], place + count
        if self._written and self._written[-1][1] == block:
            self._written[-1][1] += 1
        else:
            self._written.append([block, block + 1])
        if time.monotonic() - self._saved >= SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Flush the written rows to the disk, then record them."""
        os.fsync(self._file)
        write_atomically(self._record, lambda path: path.write_text(json.dumps(self._written)))
        self._saved = time.monotonic()

    def finish(self) -> None:
        """Give the file its final name. One process calls it, after all left their contexts."""
        assert not len(self.remaining()), f"{self.partial} is not complete"
        os.replace(self.partial, self.path)
        sync_folder(self.path.parent)
        self.forget()

    def forget(self) -> None:
        """Remove the records, and partly written files of killed processes. One process calls it,
        while none has the file open."""
        for old in [*self._records(), *self.path.parent.glob(f".{self.path.stem}.*.tmp")]:
            old.unlink()

    def __enter__(self) -> RowFile:
        try:
            array = np.lib.format.open_memmap(self.partial, "r")
        except ValueError as error:
            raise ValueError(f"{self.partial} is broken ({error}): remove {self.path.parent} and start again") from error
        if array.shape != self.shape or array.dtype != np.float32:
            raise ValueError(f"{self.partial} holds {array.shape} and not {self.shape}: remove {self.path.parent}")
        self._offset, self._saved = array.offset, time.monotonic()
        self._written = json.loads(self._record.read_text()) if self._record.exists() else []
        self._file = os.open(self.partial, os.O_RDWR | getattr(os, "O_BINARY", 0))
        return self

    def __exit__(self, *error: object) -> None:
        try:
            with contextlib.suppress(OSError) if error[0] else contextlib.nullcontext():  # the first error says more
                self.save()  # after an error too: finished rows are kept
        finally:
            os.close(self._file)

    def _records(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{self.path.stem}.progress_*.json"))


def npy_bytes(array: np.ndarray) -> bytes:
    """A small array as a .npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


class StoredRows:
    """Rows of a finished file, read from the disk when they are asked for.

    A memory map would count as memory of the process, as far as it was read: all of the file after
    one pass through it.
    """

    def __init__(self, path: Path) -> None:
        mapped = np.load(path, mmap_mode="r")
        if mapped.dtype != np.float32 or not mapped.flags.c_contiguous:
            raise ValueError(f"{path} holds {mapped.dtype} and not float32 rows: extract again")
        self.path, self.shape, self._offset = path, mapped.shape, mapped.offset
        self._row_bytes = 4 * math.prod(self.shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """(n, ...) float32: a range of rows, or any numbers of rows, in their order."""
        if not isinstance(rows, slice) and len(rows) and np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))):
            rows = slice(int(rows[0]), int(rows[0]) + len(rows))
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            assert step == 1, "a range"
            count, offset = max(0, stop - start), self._offset + start * self._row_bytes
            read = np.fromfile(self.path, np.float32, count * math.prod(self.shape[1:]), offset=offset)
            return read.reshape(count, *self.shape[1:])
        found = np.empty((len(rows), *self.shape[1:]), np.float32)
        with open(self.path, "rb", buffering=0) as file:
            for row, values in zip(rows.tolist(), found, strict=True):
                file.seek(self._offset + row * self._row_bytes)
                if file.readinto(values.data) != self._row_bytes:
                    raise OSError(f"{self.path} ends before row {row}: extract again")
        return found
