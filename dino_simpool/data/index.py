"""The list of all images of a source: arrays that are written once and then mapped from a file.

A Python list of 1.28 million paths takes 150 MB in each loader process, because reading it writes
reference counts and so copies its pages. Here the paths are one buffer of bytes with an array of
start positions: 50 MB that all processes of a node share. The file has the safetensors format,
whose loader for torch maps the arrays; that for numpy would copy them in each process.

M images, F files and folders whose change makes the index stale, C top-level folders.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dino_simpool.data.archives import Place

FORMAT = "3"
"""Stored in each file. Files with another number are stale."""
MEMBER = 1 + len(Place._fields)
"""Numbers for each image in an archive: the row of the archive in `watched`, then its Place."""


class Strings:
    """An immutable sequence of M strings in two arrays.

    data: uint8, each in UTF-8 and with "\\n" after it.   starts: (M + 1,) int64, where each begins.
    """

    def __init__(self, data: np.ndarray, starts: np.ndarray) -> None:
        self.data, self.starts = data, starts

    @classmethod
    def of(cls, strings: Iterable[str]) -> Strings:
        """Pack strings."""
        return cls.packed([text.encode("utf-8", "surrogateescape") for text in strings])

    @classmethod
    def packed(cls, encoded: Sequence[bytes]) -> Strings:
        """Pack strings that are already encoded."""
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return cls._joined([b"\n".join(encoded), b"\n" * bool(encoded)], [lengths + 1])

    @classmethod
    def chain(cls, parts: Sequence[tuple[Strings, slice]]) -> Strings:
        """Concatenate ranges of rows of several sequences."""
        data = [strings.data[strings.starts[rows.start] : strings.starts[rows.stop]].data for strings, rows in parts]
        return cls._joined(data, [np.diff(strings.starts[rows.start : rows.stop + 1]) for strings, rows in parts])

    @classmethod
    def _joined(cls, data: Sequence[bytes | memoryview], lengths: Sequence[np.ndarray]) -> Strings:
        """data: the strings, each with its newline.   lengths: of each string, with its newline."""
        starts = np.concatenate([np.zeros(1, np.int64), *lengths]).cumsum()
        return cls(np.frombuffer(b"".join(data), np.uint8), starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> str:
        place = range(len(self))[index]
        return self.data[self.starts[place] : self.starts[place + 1] - 1].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def below(self, folder: str) -> Strings:
        """os.path.join(folder, path) for each path; an empty path becomes `folder` itself."""
        if not folder or not len(self):
            return self
        lines = b"\n" + self.data.tobytes()
        plain = lines.count(b"\n") == len(self) + 1 and b"\n/" not in lines and b"\n\n" not in lines
        if not plain or os.sep != "/":  # absolute paths of Windows begin in many ways
            return Strings.of(os.path.join(folder, path) if path else folder for path in self)
        prefix = os.path.join(folder, "").encode("utf-8", "surrogateescape")  # all at once is ten times as fast for millions
        lines = lines[:-1].replace(b"\n", b"\n" + prefix)[1:]
        return self._joined([lines, b"\n"], [np.diff(self.starts) + len(prefix)])


@dataclass(frozen=True, eq=False)
class Index:
    """The images of one source, below its base folder. It is a sequence of their paths."""

    names: Strings
    """(M) paths; in archives ARCHIVE/PATH_INSIDE, or PATH_INSIDE if that is the source."""
    groups: Strings = field(default_factory=lambda: Strings.of([""]))
    """(C) top-level folders in the order of their images, also empty ones. "" stands for none."""
    counts: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    """(C,) int64, the number of images in each group."""
    watched: Strings = field(default_factory=lambda: Strings.of([]))
    """(F) archives and lists, then folders; "" is the base folder itself."""
    stamps: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    """(F, 2) int64: mtime in nanoseconds, and size in bytes (of folders: ctime in nanoseconds)."""
    members: np.ndarray = field(default_factory=lambda: np.zeros((0, MEMBER), np.int64))
    """(M, MEMBER) int64: row of the archive in `watched`, or -1, and Place; (0, MEMBER) if none."""
    compressed: Strings = field(default_factory=lambda: Strings.of([]))
    """Compressed archives, which cannot be read."""
    left_out: dict[str, int] = field(default_factory=dict)
    """How many other files were left out, by their kind (names.kind_left_out)."""
    file: str = ""
    """Where the arrays are mapped from; empty if they are in memory."""
    sha256: str = ""
    """The digest, if it is already known."""

    @classmethod
    def of(cls, paths: Iterable[str]) -> Index:
        """The index of a list of files."""
        names = Strings.of(paths)
        return cls(names, counts=np.array([len(names)], np.int64))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> str:
        return self.names[index]

    def __getstate__(self) -> dict[str, Any]:
        return {"file": self.file, "sha256": self.sha256} if self.file else self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Another process maps the same file; its content is not sent.
        self.__dict__.update(open_index(state["file"], state["sha256"]).__dict__ if state["file"] else state)

    def member(self, index: int) -> tuple[str, tuple[int, int], Place] | None:
        """Path and stamp of the archive of an image, and its Place; None for an ordinary file."""
        if not len(self.members):
            return None
        archive, *place = self.members[index].tolist()
        mtime, size = self.stamps[archive].tolist()
        return None if archive < 0 else (self.watched[archive], (mtime, size), Place(*place))

    def digest(self) -> str:
        """SHA-256 of the names, joined by newlines."""
        return self.sha256 or hashlib.sha256(self.names.data[:-1].data).hexdigest()

    def images_per_group(self) -> dict[str, int]:
        """The number of images by group, in their order."""
        return dict(zip(self.groups, self.counts.tolist(), strict=True))

    def first_of_each_group(self, count: int) -> Index:
        """The first `count` images of each group, which has none or at least that many."""
        starts = (self.counts.cumsum() - self.counts).tolist()
        rows = [slice(start, start + count) for start, images in zip(starts, self.counts.tolist(), strict=True) if images]
        members = np.concatenate([self.members[r] for r in rows]) if len(self.members) else self.members
        counts = np.where(self.counts > 0, count, 0)
        names = Strings.chain([(self.names, r) for r in rows])
        return Index(names, self.groups, counts, self.watched, self.stamps, members, self.compressed, self.left_out)

    def save(self, path: str | Path) -> None:
        """Write the file. OSError or SafetensorError if that fails."""
        arrays = {
            **{f"{name}.{part}": getattr(getattr(self, name), part) for name in _STRINGS for part in ("data", "starts")},
            **{name: getattr(self, name) for name in _ARRAYS},
        }
        about = {"format": FORMAT, "sha256": self.digest(), "left_out": json.dumps(self.left_out)}
        save_file(arrays, path, metadata=about | {"content": _checksum(arrays, about)})


_STRINGS = ("names", "groups", "watched", "compressed")
_ARRAYS = ("counts", "stamps", "members")


def _checksum(arrays: dict[str, np.ndarray], about: dict[str, str]) -> str:
    """SHA-256 of all that a file holds: 0.03 s for 1.28 million images."""
    digest = hashlib.sha256(repr(sorted(about.items())).encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def open_index(path: str, sha256: str | None = None) -> Index:
    """Map a file that `Index.save` wrote. sha256: the digest that it must have.

    ValueError if it is broken or has another format or digest, OSError if it cannot be opened.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata()
            if about["format"] != FORMAT:
                raise ValueError(f"format {about['format']}, not {FORMAT}")
            arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118 (not a dict)
        if about.pop("content") != _checksum(arrays, about):
            raise ValueError("its content does not match its checksum")
        for array in arrays.values():
            array.flags.writeable = False
        values: dict[str, Any] = {name: arrays[name] for name in _ARRAYS}
        values |= {name: Strings(arrays[f"{name}.data"], arrays[f"{name}.starts"]) for name in _STRINGS}
        index = Index(**values, left_out=json.loads(about["left_out"]), file=path, sha256=about["sha256"])
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise ValueError(f"{path} is not an index of this version ({error}): remove it") from error
    if sha256 not in (None, index.sha256):
        raise ValueError(f"{path} was replaced by an index of other images in the meantime: start again")
    return index


def join(parts: Sequence[tuple[str, Index]]) -> Index:
    """Concatenate (base folder, index) pairs; paths become relative to the current folder."""
    names, watched, members, shift = [], [], [], 0
    for base, index in parts:
        names.append((index.names.below(base), slice(0, len(index))))
        watched.append((index.watched.below(base), slice(0, len(index.watched))))
        place = index.members.copy() if len(index.members) else np.full((len(index), MEMBER), -1, np.int64)
        place[:, 0] += np.where(place[:, 0] >= 0, shift, 0)
        members.append(place)
        shift += len(index.watched)
    any_archive = any(len(index.members) for _, index in parts)
    return Index(
        Strings.chain(names),
        counts=np.array([sum(len(index) for _, index in parts)], np.int64),
        watched=Strings.chain(watched),
        stamps=np.concatenate([index.stamps for _, index in parts]),
        members=np.concatenate(members)[: None if any_archive else 0],
    )
