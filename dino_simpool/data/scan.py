"""Lists the images of a source: a folder, an archive, or a text file of paths.

Folders are read by many threads, level by level, because a network file system is slow to answer
but answers many requests at once. The order is that of torchvision's ImageFolder: top-level folders
are sorted, then the folders below them, then the files in each folder. An archive in a folder
counts as unpacked there, so its images are sorted among the others. An archive next to a folder of
the same name (train.tar and train/) is a packed copy of that folder, and is skipped.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISDIR
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from dino_simpool.data.archives import (
    ARCHIVE_SUFFIXES,
    IMAGE_SUFFIXES,
    PACKED_SUFFIXES,
    Place,
    TooMany,
    compressed_error,
    is_compressed,
    list_archive,
)
from dino_simpool.data.index import MEMBER, Index, Strings
from dino_simpool.logs import progress

T = TypeVar("T")
Stamp = tuple[int, int]
_Folder = tuple[str, tuple[str, ...]]
"""Path below the root, and the real paths from the root to it: a link to one would never end."""
THREADS = 16
RECENT_NS = 2 * 10**9
"""Coarsest file system clock (FAT). Two changes within this time may show the same time."""
_IN_NO_ARCHIVE = Place(-1, -1, -1, -1, -1)


def scan(root: str, *, limit: float = math.inf, bar: bool = False) -> Index:
    """List the images of a source. There may be none.

    limit: TooMany is raised if there are more files and folders.   bar: show progress.
    FileNotFoundError if the source or a listed file is missing, PermissionError for an unreadable
    folder, ValueError for a broken or compressed archive or a file that is not a list.
    """
    try:
        with _threads() as pool, progress(None, 0, f"listing {root}", shown=bar) as shown:
            if is_list(root):
                return _scan_list(root, limit, shown)
            listing = _Listing(root, limit, pool, shown)
            if os.path.isdir(root):
                listing.open_archives(listing.walk())
            elif os.path.isfile(root):
                listing.open_archives([""])
            else:
                raise FileNotFoundError(f"{root} does not exist: give a folder of images")
            return listing.index()
    except PermissionError as error:
        raise PermissionError(f"{error.filename} cannot be read: change its permissions or give another folder") from error


def is_archive(root: str) -> bool:
    """Whether a file has the name of an archive that can be read."""
    return root.lower().endswith(ARCHIVE_SUFFIXES)


def is_list(root: str) -> bool:
    """Whether a source is a text file of paths, not a folder or an archive."""
    return os.path.isfile(root) and not is_archive(root)


def below(root: str, path: str) -> str:
    """The path of what is at `path` in a source; "" is the source itself."""
    return os.path.join(root, path) if path else root


def stamp(path: str) -> Stamp:
    """The mtime in nanoseconds, and the size in bytes of a file or the ctime of a folder.

    tar, rsync and cp restore the original mtime of a folder after filling it, but not its ctime.
    """
    found = os.stat(path)
    return found.st_mtime_ns, found.st_ctime_ns if S_ISDIR(found.st_mode) else found.st_size


def stamps(paths: Sequence[str]) -> np.ndarray:
    """(F, 2) int64: the `stamp` of each path, zeros for one that cannot be read."""

    def of(path: str) -> Stamp:
        try:
            return stamp(path)
        except OSError:
            return 0, 0

    return np.array(_in_threads(of, paths), np.int64).reshape(-1, 2)


def is_recent(index: Index) -> bool:
    """Whether something changed so recently that another change now might not change its time."""
    # No file is large enough for its size to look like a time.
    return bool((np.abs(time.time_ns() - index.stamps) < RECENT_NS).any())


@contextlib.contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """A pool of threads that drops the remaining work after an error."""
    pool = ThreadPoolExecutor(THREADS)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _in_threads(function: Callable[[str], T], paths: Sequence[str]) -> list[T]:
    """Apply the function to each path with many threads, each taking 64 paths at a time."""
    starts = range(0, len(paths), 64)
    with _threads() as pool:
        parts = pool.map(lambda start: [function(path) for path in paths[start : start + 64]], starts)
        return [each for part in parts for each in part]


@dataclass
class _Listing:
    """What was found. Paths are relative to the root; "" is the root itself."""

    root: str
    limit: float
    pool: ThreadPoolExecutor
    bar: tqdm[Any]
    images: dict[str, bytes] = field(default_factory=dict)
    """By folder: file names in UTF-8, joined by "/". A list would take four times the memory."""
    members: dict[str, list[tuple[str, str, int, Place]]] = field(default_factory=dict)
    """By folder, images in archives: file name, path to show, row of the archive, place."""
    top: set[str] = field(default_factory=set)
    """Top-level folders."""
    compressed: list[str] = field(default_factory=list)
    archives: dict[str, Stamp] = field(default_factory=dict)
    folders: dict[str, Stamp] = field(default_factory=dict)

    def walk(self) -> list[str]:
        """Add all folders with their images; returns the archives in them."""
        archives, seen = [], 0
        level: list[_Folder] = [("", (os.path.realpath(self.root),))]
        while level:
            lower: list[_Folder] = []
            contents = self.pool.map(self.read_folder, level)
            for (path, _), (before, images, folders, packed, compressed) in zip(level, contents, strict=True):
                self.folders[path] = before
                if images:
                    self.images[path] = "/".join(images).encode("utf-8", "surrogateescape")
                if not path:
                    self.top |= {name for name, _ in folders}
                archives += packed
                self.compressed += compressed
                lower += folders
                self.bar.update(len(images))
                seen += len(images) + len(packed) + 1
                if seen + len(lower) > self.limit:
                    raise TooMany
            level = lower
        return archives

    def read_folder(self, folder: _Folder) -> tuple[Stamp, list[str], list[_Folder], list[str], list[str]]:
        """Its stamp, image names, folders, archives, compressed archives; not what is hidden."""
        path, reals = folder
        images: list[str] = []
        folders: list[_Folder] = []
        archives, compressed = set(), set()
        where = below(self.root, path)
        before = stamp(where)  # a change while the folder is read must be noticed later
        with os.scandir(where) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                inside, link = os.path.join(path, entry.name), entry.is_symlink()
                if os.path.isdir(entry.path) if link else entry.is_dir():
                    real = os.path.realpath(entry.path) if link else os.path.join(reals[-1], entry.name)
                    if real not in reals:
                        folders.append((inside, (*reals, real)))
                elif not (link or entry.is_file()):
                    continue  # reading a pipe would never end
                elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                    images.append(entry.name)
                    if len(images) > self.limit:
                        raise TooMany
                elif is_archive(entry.name):
                    archives.add(inside)
                elif is_compressed(entry.name):
                    compressed.add(inside)
        packed = {name + suffix for name, _ in folders for suffix in PACKED_SUFFIXES}
        return before, sorted(images), folders, sorted(archives - packed), sorted(compressed - packed)

    def open_archives(self, archives: list[str]) -> None:
        """Add the images in the archives."""

        def read(archive: str) -> tuple[Stamp, dict[str, Place], set[str]]:
            path = below(self.root, archive)
            if not os.path.isfile(path):
                raise FileNotFoundError(f"{path} is a broken link: remove it, or put the archive where it points")
            return stamp(path), *list_archive(path, limit=self.limit)

        seen = 0
        archives = sorted(archives)
        for row, (archive, found) in enumerate(zip(archives, self.pool.map(read, archives), strict=True)):
            self.archives[archive], images, folders = found
            seen += len(images)
            if seen > self.limit:
                raise TooMany
            here = os.path.dirname(archive)
            self.top |= {here.split(os.sep)[0]} if here else folders
            for name, place in images.items():
                folder, _, file = name.rpartition("/")
                member = (file, os.path.join(archive, name), row, place)
                self.members.setdefault(os.path.join(here, folder) if folder else here, []).append(member)
            self.bar.update(len(images))

    def index(self) -> Index:
        """Sort and pack what was found."""
        counts = dict.fromkeys(self.top, 0)
        names: list[bytes] = []
        members: list[tuple[int, ...]] = []
        for folder in sorted({*self.images, *self.members}, key=lambda path: (path.split(os.sep)[0], path)):
            rows = list(self.members.get(folder, []))
            if folder in self.images:
                prefix, files = os.path.join(folder, ""), self.images[folder].decode("utf-8", "surrogateescape").split("/")
                rows += [(file, prefix + file, -1, _IN_NO_ARCHIVE) for file in files]
            rows.sort()
            names += [path.encode("utf-8", "surrogateescape") for _, path, _, _ in rows]
            if self.archives:
                members += [(row, *place) for _, _, row, place in rows]
            top = folder.split(os.sep)[0]
            counts[top] = counts.get(top, 0) + len(rows)
        groups, watched = sorted(counts), self.archives | self.folders
        return Index(
            names=Strings.packed(names),
            groups=Strings.of(groups),
            counts=np.array([counts[group] for group in groups], np.int64),
            watched=Strings.of(watched),
            stamps=np.array(list(watched.values()), np.int64).reshape(-1, 2),
            members=np.array(members, np.int64).reshape(-1, MEMBER),
            left_out=Strings.of(sorted(self.compressed)),
        )


def _scan_list(file: str, limit: float, bar: tqdm[Any]) -> Index:
    """The paths in a text file, relative to the folder of the file. Each must exist."""
    if file.lower().endswith(IMAGE_SUFFIXES):
        raise ValueError(f"{file} is a single image: give its folder, or a text file with one path per line")
    if is_compressed(file):
        raise compressed_error(file)
    before = stamp(file)
    try:
        lines = [line.strip() for line in Path(file).read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: give a folder, or a text file with one path per line") from error
    paths = [line for line in lines if line and not line.startswith("#")]
    if not paths:
        raise ValueError(f"{file} lists no images: write one path per line, relative to the file or absolute")
    if len(paths) > limit:
        raise TooMany
    folder = os.path.dirname(file)
    for path, exists in zip(paths, _in_threads(lambda path: os.path.isfile(os.path.join(folder, path)), paths), strict=True):
        if not exists:
            raise FileNotFoundError(f"{path}, listed in {file}, does not exist in {folder or '.'}: correct or remove the line")
    bar.update(len(paths))
    names, watched = Strings.of(paths), Strings.of([os.path.basename(file)])
    return Index(names, counts=np.array([len(names)], np.int64), watched=watched, stamps=np.array([before], np.int64))
