"""Listing a source: a folder with all that is below it, an archive, or a text file of paths.

Folders are read by many threads, level by level, since a network file system answers each question late but many at once.
The order is that of torchvision's ImageFolder: top-level folders sorted, in them the folders sorted, in a folder the files. An
archive in a folder counts as unpacked there, so its images are sorted among the others. One beside a folder of its own name
(train.tar and train/) is the packed copy of that folder, and left out.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISDIR
from typing import Any, NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm

from dino_simpool.data.archives import (
    ARCHIVE_SUFFIXES,
    COMPRESSED_SUFFIXES,
    IMAGE_SUFFIXES,
    Place,
    TooMany,
    compressed_error,
    is_compressed,
    list_archive,
)
from dino_simpool.data.index import MEMBER, Index, Strings

T = TypeVar("T")
THREADS = 16
RECENT_NS = 2 * 10**9
"""Coarsest clock of a file system (FAT). What changed twice within it may show the time of the first change."""


class _Folder(NamedTuple):
    """A folder below the root, its real path, and those of the folders that it lies in: a link to one would never end."""

    path: str
    real: str
    ancestors: frozenset[str]


class _Content(NamedTuple):
    """What is in a folder, but for hidden files and folders: file names, sorted."""

    stamp: tuple[int, int]
    images: list[str]
    folders: list[_Folder]
    archives: list[str]
    compressed: list[str]


@dataclass
class _Listing:
    """What was found, by folder below the root."""

    images: dict[str, bytes] = field(default_factory=dict)
    """Names of the image files, in UTF-8 with "/" between them: a list would take four times the memory."""
    members: dict[str, list[tuple[str, str, int, Place]]] = field(default_factory=dict)
    """Images in archives by the folder that unpacking would put them in: name, path to show, row of the archive, place."""
    top: set[str] = field(default_factory=set)
    """Top-level folders."""
    archives: list[str] = field(default_factory=list)
    compressed: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    archive_stamps: list[tuple[int, int]] = field(default_factory=list)
    folder_stamps: list[tuple[int, int]] = field(default_factory=list)


def scan(root: str, *, limit: int | None = None, bar: bool = False) -> Index:
    """List the images of a source; it may have none.

    limit: TooMany is raised beyond so many files and folders.   bar: show the progress.   Raises FileNotFoundError if the
    source or a listed file is missing, PermissionError for a folder that may not be read, ValueError for a damaged or
    compressed archive and for what is no list.
    """
    try:
        with _threads() as pool, _progress(root, bar) as shown:
            if os.path.isfile(root):
                return _scan_archive(root, limit, shown) if is_archive(root) else _scan_list(root, limit, shown)
            if not os.path.isdir(root):
                raise FileNotFoundError(f"{root} is no existing folder: give a folder of images")
            listing = _Listing()
            _walk(root, listing, pool, limit, shown)
            _open_archives(root, listing, pool, limit, shown)
    except PermissionError as error:
        raise PermissionError(f"{error.filename} may not be read: change its permissions or give another folder") from error
    return _index(listing)


def is_archive(root: str) -> bool:
    """Whether a file is called like an archive that can be read."""
    return root.lower().endswith(ARCHIVE_SUFFIXES)


def is_list(root: str) -> bool:
    """Whether a source is a text file of paths, and neither a folder nor an archive."""
    return os.path.isfile(root) and not is_archive(root)


def stamp(path: str) -> tuple[int, int]:
    """What changes with a file or a folder: its mtime in nanoseconds, and the size of a file in bytes or the ctime of a folder.

    tar, rsync and cp set the mtime of a folder back to what it was elsewhere when they have filled it, but not its ctime.
    """
    found = os.stat(path)
    return found.st_mtime_ns, found.st_ctime_ns if S_ISDIR(found.st_mode) else found.st_size


def stamps(paths: Sequence[str]) -> np.ndarray:
    """(F, 2) int64: `stamp` of each path; zeros for one that cannot be seen."""
    return np.array(_in_threads(_stamp_or_nothing, paths), np.int64).reshape(-1, 2)


def is_recent(index: Index) -> bool:
    """Whether something changed so shortly ago that another change now might leave its time as it is."""
    return bool((np.abs(time.time_ns() - index.stamps) < RECENT_NS).any())  # no file is so large that its size is a time


def _stamp_or_nothing(path: str) -> tuple[int, int]:
    try:
        return stamp(path)
    except OSError:
        return 0, 0


@contextlib.contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """Threads that after an error do not go on with what is left to do."""
    pool = ThreadPoolExecutor(THREADS)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _in_threads(function: Callable[[str], T], paths: Sequence[str], size: int = 64) -> list[T]:
    """The function of each path, by many threads, each of which takes `size` paths at a time."""
    with _threads() as pool:
        parts = pool.map(lambda start: [function(path) for path in paths[start : start + size]], range(0, len(paths), size))
        return [each for part in parts for each in part]


def _progress(root: str, shown: bool) -> tqdm[Any]:
    interval = 0.5 if sys.stderr.isatty() else 30.0
    return tqdm(
        desc=f"listing {root}", unit=" files", disable=not shown, delay=interval, mininterval=interval, maxinterval=interval,
        leave=False,
    )  # fmt: skip


def _walk(root: str, listing: _Listing, pool: ThreadPoolExecutor, limit: int | None, bar: tqdm[Any]) -> None:
    """Put all folders with their images into the listing, and name the archives."""
    real = os.path.realpath(root)
    level, seen = [_Folder("", real, frozenset([real]))], 0
    while level:
        below: list[_Folder] = []
        for folder, content in zip(level, pool.map(lambda each: _read_folder(root, each, limit), level), strict=True):
            if content.images:
                listing.images[folder.path] = "/".join(content.images).encode("utf-8", "surrogateescape")
            listing.folders.append(folder.path)
            listing.folder_stamps.append(content.stamp)
            listing.archives += content.archives
            listing.compressed += content.compressed
            below += content.folders
            bar.update(len(content.images))
            seen += len(content.images) + len(content.archives) + 1
            if limit is not None and seen + len(below) > limit:
                raise TooMany
        if level[0].path == "":
            listing.top |= {folder.path for folder in below}
        level = below


def _read_folder(root: str, folder: _Folder, limit: int | None) -> _Content:
    where = os.path.join(root, folder.path) if folder.path else root
    before = stamp(where)  # a change while the folder is read must show later
    images, folders, archives, compressed = [], [], [], []
    with os.scandir(where) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = os.path.join(folder.path, entry.name)
            if _is_folder(entry):
                real = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(folder.real, entry.name)
                if real not in folder.ancestors:
                    folders.append(_Folder(path, real, folder.ancestors | {real}))
            elif not (entry.is_symlink() or entry.is_file()):
                continue  # a pipe would never end
            elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                images.append(entry.name)
                if limit is not None and len(images) > limit:
                    raise TooMany
            elif is_archive(entry.name):
                archives.append(path)
            elif is_compressed(entry.name):
                compressed.append(path)
    packed = {each.path + suffix for each in folders for suffix in ARCHIVE_SUFFIXES + COMPRESSED_SUFFIXES}
    return _Content(before, sorted(images), folders, sorted({*archives} - packed), sorted({*compressed} - packed))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry of a folder is a folder or a link to one; a link to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _open_archives(root: str, listing: _Listing, pool: ThreadPoolExecutor, limit: int | None, bar: tqdm[Any]) -> None:
    """Put the images of the archives into the listing."""
    listing.archives.sort()

    def read(archive: str) -> tuple[tuple[int, int], dict[str, Place], set[str]]:
        path = os.path.join(root, archive)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path} is a link to nothing: remove it, or put the archive where it leads")
        return stamp(path), *list_archive(path, limit=limit)

    seen = 0
    for row, (archive, found) in enumerate(zip(listing.archives, pool.map(read, listing.archives), strict=True)):
        before, images, folders = found
        listing.archive_stamps.append(before)
        seen += len(images)
        if limit is not None and seen > limit:
            raise TooMany
        here = os.path.dirname(archive)
        listing.top |= {here.split(os.sep)[0]} if here else folders
        _add_members(listing, row, archive, here, images)
        bar.update(len(images))


def _add_members(listing: _Listing, row: int, archive: str, here: str, images: dict[str, Place]) -> None:
    for name, place in images.items():
        folder, _, file = name.rpartition("/")
        merged = os.path.join(here, folder) if folder else here
        listing.members.setdefault(merged, []).append((file, os.path.join(archive, name), row, place))


def _scan_archive(path: str, limit: int | None, bar: tqdm[Any]) -> Index:
    """The images of one archive: as of the folder that unpacking it would make."""
    before = stamp(path)
    images, folders = list_archive(path, limit=limit)
    listing = _Listing(top=folders, archives=[""], archive_stamps=[before])
    _add_members(listing, 0, "", "", images)
    bar.update(len(images))
    return _index(listing)


def _scan_list(file: str, limit: int | None, bar: tqdm[Any]) -> Index:
    """The paths that a text file names, each of which must exist, below the folder of the file."""
    if file.lower().endswith(IMAGE_SUFFIXES):
        raise ValueError(f"{file} is one image: give the folder that holds it, or a text file with one path a line")
    if is_compressed(file):
        raise compressed_error(file)
    before = stamp(file)
    try:
        lines = [line.strip() for line in Path(file).read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8: give a folder, or a text file with one path a line") from error
    paths = [line for line in lines if line and not line.startswith("#")]
    if not paths:
        raise ValueError(f"{file} names no images: write one path a line, relative to the file or absolute")
    if limit is not None and len(paths) > limit:
        raise TooMany
    folder = os.path.dirname(file)
    for path, exists in zip(paths, _in_threads(lambda path: os.path.isfile(os.path.join(folder, path)), paths), strict=True):
        if not exists:
            raise FileNotFoundError(
                f"{path}, listed in {file}, does not exist from {folder or '.'}: correct or remove the line"
            )
    bar.update(len(paths))
    names, watched = Strings.of(paths), Strings.of([os.path.basename(file)])
    return Index(names, counts=np.array([len(names)], np.int64), watched=watched, stamps=np.array([before], np.int64))


def _index(listing: _Listing) -> Index:
    """Sort what was found, and pack it."""
    counts = dict.fromkeys(listing.top, 0)
    names: list[bytes] = []
    members: list[tuple[int, ...]] = []
    for folder in sorted({*listing.images, *listing.members}, key=lambda path: (path.split(os.sep)[0], path)):
        files = listing.images[folder].decode("utf-8", "surrogateescape").split("/") if folder in listing.images else []
        prefix = os.path.join(folder, "") if folder else ""
        if listing.archives:
            rows = [(file, prefix + file, -1, Place(-1, -1, -1, -1, -1)) for file in files]
            rows = sorted(rows + listing.members.get(folder, []))
            names += [path.encode("utf-8", "surrogateescape") for _, path, _, _ in rows]
            members += [(row, *place) for _, _, row, place in rows]
            found = len(rows)
        else:
            names += [(prefix + file).encode("utf-8", "surrogateescape") for file in files]
            found = len(files)
        top = folder.split(os.sep)[0]
        counts[top] = counts.get(top, 0) + found
    groups = sorted(counts)
    return Index(
        Strings.packed(names), Strings.of(groups), np.array([counts[group] for group in groups], np.int64),
        Strings.of(listing.archives + listing.folders),
        np.array(listing.archive_stamps + listing.folder_stamps, np.int64).reshape(-1, 2),
        np.array(members, np.int64).reshape(-1, MEMBER), Strings.of(sorted(listing.compressed)),
    )  # fmt: skip
