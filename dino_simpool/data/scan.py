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
import posixpath
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from stat import S_ISDIR
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from dino_simpool.config import Exclude
from dino_simpool.data.archives import Place, TooMany, compressed_error, list_archive
from dino_simpool.data.decode import is_known_format
from dino_simpool.data.index import MEMBER, Index, Strings
from dino_simpool.data.lists import TEXT_SUFFIXES, is_binary, read_list
from dino_simpool.logs import progress
from dino_simpool.names import (
    IMAGE_SUFFIXES,
    PACKED_SUFFIXES,
    SYSTEM_FOLDERS,
    is_archive,
    is_compressed,
    is_image,
    kind_left_out,
)
from dino_simpool.names import shown as printable

T = TypeVar("T")
Stamp = tuple[int, int]
_Folder = tuple[str, tuple[str, ...]]
"""Path below the root, and the real paths from the root to it: a link to one would never end."""
THREADS = 16
RECENT_NS = 2 * 10**9
"""Coarsest file system clock (FAT). Two changes within this time may show the same time."""
NOTHING_EXCLUDED = Exclude()
_IN_NO_ARCHIVE = Place(-1, -1, -1, -1, -1)


def scan(root: str, exclude: Exclude = NOTHING_EXCLUDED, *, limit: float = math.inf, bar: bool = False) -> Index:
    """List the images of a source. There may be none.

    A file that is an image itself is a source of one, whatever its name.

    limit: TooMany is raised if there are more files and folders.   bar: show progress.
    FileNotFoundError if the source or a listed file is missing, PermissionError for an unreadable
    folder, ValueError for a broken or compressed archive or a file that is not a list.
    """
    try:
        with _threads() as pool, progress(None, 0, f"listing {printable(root)}", shown=bar) as shown:
            if is_list(root):
                return _scan_list(root, exclude, limit, shown)
            listing = _Listing(root, exclude, limit, pool, shown)
            if os.path.isdir(root):
                listing.open_archives(listing.walk())
            elif os.path.isfile(root):
                listing.open_archives([""])
            else:
                what = "is neither a folder nor a file" if os.path.exists(root) else "does not exist"
                raise FileNotFoundError(f"{root} {what}: give a folder of images")
            return listing.index()
    except PermissionError as error:
        raise PermissionError(f"{error.filename} cannot be read: change its permissions or give another folder") from error


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
    """What was found. Paths are relative to the root, with "/" on every system: the names of images
    and their order are the same everywhere. "" is the root itself."""

    root: str
    exclude: Exclude
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
    left_out: Counter[str] = field(default_factory=Counter)
    """How many files of which kind are not read."""
    archives: dict[str, Stamp] = field(default_factory=dict)
    folders: dict[str, Stamp] = field(default_factory=dict)

    def walk(self) -> list[str]:
        """Add all folders with their images; returns the archives in them."""
        archives, seen = [], 0
        level: list[_Folder] = [("", (os.path.realpath(self.root),))]
        while level:
            lower: list[_Folder] = []
            contents = self.pool.map(self.read_folder, level)
            for (path, _), (before, images, folders, packed, compressed, left_out) in zip(level, contents, strict=True):
                self.left_out += left_out
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

    def read_folder(self, folder: _Folder) -> tuple[Stamp, list[str], list[_Folder], list[str], list[str], Counter[str]]:
        """Its stamp, image names, folders, archives, compressed archives, and what is left out."""
        path, reals = folder
        images: list[str] = []
        folders: list[_Folder] = []
        archives, compressed = set(), set()
        left_out: Counter[str] = Counter()
        excluded = self.exclude.which if self.exclude.patterns else None
        where = below(self.root, path)
        before = stamp(where)  # a change while the folder is read must be noticed later
        with os.scandir(where) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    left_out["hidden"] += 1
                    continue
                if excluded and (kind := excluded(posixpath.join(path, entry.name))):
                    left_out[kind] += 1
                    continue
                inside, link = posixpath.join(path, entry.name), entry.is_symlink()
                if os.path.isdir(entry.path) if link else entry.is_dir():
                    if entry.name.lower() in SYSTEM_FOLDERS:
                        left_out[f"folder(s) {entry.name}"] += 1
                        continue
                    real = os.path.realpath(entry.path) if link else os.path.join(reals[-1], entry.name)
                    if real not in reals:
                        folders.append((inside, (*reals, real)))
                elif not (link or entry.is_file()):
                    left_out["that are no files"] += 1  # reading a pipe would never end
                elif entry.name.lower().endswith(IMAGE_SUFFIXES):  # is_image, without the cost of a call
                    images.append(entry.name)
                    if len(images) > self.limit:
                        raise TooMany
                elif is_archive(entry.name):
                    archives.add(inside)
                elif is_compressed(entry.name):
                    compressed.add(inside)
                else:
                    left_out[kind_left_out(entry.name)] += 1
        packed = {name + suffix for name, _ in folders for suffix in PACKED_SUFFIXES}
        return before, sorted(images), folders, sorted(archives - packed), sorted(compressed - packed), left_out

    def open_archives(self, archives: list[str]) -> None:
        """Add the images in the archives."""

        def read(archive: str) -> tuple[Stamp, dict[str, Place], set[str], Counter[str]]:
            path = below(self.root, archive)
            if not os.path.isfile(path):
                raise FileNotFoundError(f"{path} is a broken link: remove it, or put the archive where it points")
            return stamp(path), *list_archive(path, self.exclude, posixpath.dirname(archive), limit=self.limit)

        seen = 0
        archives = sorted(archives)
        for row, (archive, found) in enumerate(zip(archives, self.pool.map(read, archives), strict=True)):
            self.archives[archive], images, folders, left_out = found
            self.left_out += left_out
            seen += len(images)
            if seen > self.limit:
                raise TooMany
            here = posixpath.dirname(archive)
            self.top |= {here.split("/")[0]} if here else folders
            for name, place in images.items():
                folder, _, file = name.rpartition("/")
                member = (file, posixpath.join(archive, name), row, place)
                self.members.setdefault(posixpath.join(here, folder) if folder else here, []).append(member)
            self.bar.update(len(images))

    def index(self) -> Index:
        """Sort and pack what was found."""
        counts = dict.fromkeys(self.top, 0)
        names: list[bytes] = []
        members: list[tuple[int, ...]] = []
        for folder in sorted({*self.images, *self.members}, key=lambda path: (path.split("/")[0], path)):
            rows = list(self.members.get(folder, []))
            if folder in self.images:
                prefix, files = posixpath.join(folder, ""), self.images[folder].decode("utf-8", "surrogateescape").split("/")
                rows += [(file, prefix + file, -1, _IN_NO_ARCHIVE) for file in files]
            rows.sort()
            names += [path.encode("utf-8", "surrogateescape") for _, path, _, _ in rows]
            if self.archives:
                members += [(row, *place) for _, _, row, place in rows]
            top = folder.split("/")[0]
            counts[top] = counts.get(top, 0) + len(rows)
        groups, watched = sorted(counts), self.archives | self.folders
        return Index(
            names=Strings.packed(names),
            groups=Strings.of(groups),
            counts=np.array([counts[group] for group in groups], np.int64),
            watched=Strings.of(watched),
            stamps=np.array(list(watched.values()), np.int64).reshape(-1, 2),
            members=np.array(members, np.int64).reshape(-1, MEMBER),
            compressed=Strings.of(sorted(self.compressed)),
            left_out=dict(self.left_out),
        )


def _scan_list(file: str, exclude: Exclude, limit: float, bar: tqdm[Any]) -> Index:
    """The paths in a text file, relative to its folder; or the file itself, if it is an image."""
    before, folder = stamp(file), os.path.dirname(file)
    if is_compressed(file):
        raise compressed_error(file)
    if is_image(file) or (is_binary(file) and (not file.lower().endswith(TEXT_SUFFIXES) or is_known_format(file))):
        paths = [os.path.basename(file)]
    else:
        paths = read_list(file, lambda lines: _in_threads(lambda line: os.path.isfile(os.path.join(folder, line)), lines))
    if len(paths) > limit:
        raise TooMany
    bar.update(len(paths))
    left_out: Counter[str] = Counter()
    if exclude.patterns:
        kinds = [
            exclude.which(os.path.relpath(os.path.join(folder, path), folder or ".").replace(os.sep, "/")) for path in paths
        ]
        paths = [path for path, kind in zip(paths, kinds, strict=True) if not kind]
        left_out.update(filter(None, kinds))
    names, watched = Strings.of(paths), Strings.of([os.path.basename(file)])
    counts, stamps = np.array([len(names)], np.int64), np.array([before], np.int64)
    return Index(names, counts=counts, watched=watched, stamps=stamps, left_out=dict(left_out))
