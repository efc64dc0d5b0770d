"""Lists the images of a source: a folder, an archive, or a text file of paths.

Folders are read by many threads, level by level, because a network file system is slow to answer
but answers many requests at once. The order is that of torchvision's ImageFolder: top-level folders
are sorted, then the folders below them, then the files in each folder. An archive in a folder
counts as unpacked there, so its images are sorted among the others. An archive next to a folder of
the same name (train.tar and train/) is a packed copy of that folder, and is skipped.
"""

from __future__ import annotations

import contextlib
import os
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
from dino_simpool.logs import progress

T = TypeVar("T")
THREADS = 16
RECENT_NS = 2 * 10**9
"""Coarsest file system clock (FAT). Two changes within this time may show the same time."""


class _Folder(NamedTuple):
    """A folder below the root, its real path, and those above it, where a link would never end."""

    path: str
    real: str
    ancestors: frozenset[str]


class _Content(NamedTuple):
    """What is in a folder, without hidden files and folders; names are sorted."""

    stamp: tuple[int, int]
    images: list[str]
    folders: list[_Folder]
    archives: list[str]
    compressed: list[str]


@dataclass
class _Listing:
    """What was found, by folder below the root."""

    images: dict[str, bytes] = field(default_factory=dict)
    """Names of the image files in UTF-8, joined by "/". A list would take four times the memory."""
    members: dict[str, list[tuple[str, str, int, Place]]] = field(default_factory=dict)
    """Images in archives, by unpacked folder: name, path to show, row of the archive, place."""
    top: set[str] = field(default_factory=set)
    """Top-level folders."""
    archives: list[str] = field(default_factory=list)
    compressed: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    archive_stamps: list[tuple[int, int]] = field(default_factory=list)
    folder_stamps: list[tuple[int, int]] = field(default_factory=list)


def scan(root: str, *, limit: int | None = None, bar: bool = False) -> Index:
    """List the images of a source. There may be none.

    limit: TooMany is raised if there are more files and folders.   bar: show progress.
    FileNotFoundError if the source or a listed file is missing, PermissionError for an unreadable
    folder, ValueError for a damaged or compressed archive or a file that is not a list.
    """
    try:
        with _threads() as pool, progress(None, 0, f"listing {root}", shown=bar) as shown:
            if os.path.isfile(root):
                return _scan_archive(root, limit, shown) if is_archive(root) else _scan_list(root, limit, shown)
            if not os.path.isdir(root):
                raise FileNotFoundError(f"{root} does not exist: give a folder of images")
            listing = _Listing()
            _walk(root, listing, pool, limit, shown)
            _open_archives(root, listing, pool, limit, shown)
    except PermissionError as error:
        raise PermissionError(f"{error.filename} cannot be read: change its permissions or give another folder") from error
    return _index(listing)


def is_archive(root: str) -> bool:
    """Whether a file has the name of an archive that can be read."""
    return root.lower().endswith(ARCHIVE_SUFFIXES)


def is_list(root: str) -> bool:
    """Whether a source is a text file of paths, not a folder or an archive."""
    return os.path.isfile(root) and not is_archive(root)


def stamp(path: str) -> tuple[int, int]:
    """The mtime in nanoseconds, and the size in bytes of a file or the ctime of a folder.

    tar, rsync and cp restore the original mtime of a folder after filling it, but not its ctime.
    """
    found = os.stat(path)
    return found.st_mtime_ns, found.st_ctime_ns if S_ISDIR(found.st_mode) else found.st_size


def stamps(paths: Sequence[str]) -> np.ndarray:
    """(F, 2) int64: the `stamp` of each path, zeros for one that cannot be read."""
    return np.array(_in_threads(_stamp_or_nothing, paths), np.int64).reshape(-1, 2)


def is_recent(index: Index) -> bool:
    """Whether something changed so recently that another change now might not change its time."""
    return bool(
        (np.abs(time.time_ns() - index.stamps) < RECENT_NS).any()
    )  # no file is large enough for its size to look like a time


def _stamp_or_nothing(path: str) -> tuple[int, int]:
    try:
        return stamp(path)
    except OSError:
        return 0, 0


@contextlib.contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """A pool of threads that drops the remaining work after an error."""
    pool = ThreadPoolExecutor(THREADS)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _in_threads(function: Callable[[str], T], paths: Sequence[str], size: int = 64) -> list[T]:
    """Apply the function to each path with many threads, each taking `size` paths at a time."""
    with _threads() as pool:
        parts = pool.map(lambda start: [function(path) for path in paths[start : start + size]], range(0, len(paths), size))
        return [each for part in parts for each in part]


def _walk(root: str, listing: _Listing, pool: ThreadPoolExecutor, limit: int | None, bar: tqdm[Any]) -> None:
    """Add all folders with their images to the listing, and the names of the archives."""
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
    before = stamp(where)  # a change while the folder is read must be noticed later
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
                continue  # reading a pipe would never end
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
    """Whether an entry is a folder or a link to one. A link to itself is not."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _open_archives(root: str, listing: _Listing, pool: ThreadPoolExecutor, limit: int | None, bar: tqdm[Any]) -> None:
    """Add the images in the archives to the listing."""
    listing.archives.sort()

    def read(archive: str) -> tuple[tuple[int, int], dict[str, Place], set[str]]:
        path = os.path.join(root, archive)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path} is a broken link: remove it, or put the archive where it points")
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
    """The images of one archive, as in the folder that unpacking it would create."""
    before = stamp(path)
    images, folders = list_archive(path, limit=limit)
    listing = _Listing(top=folders, archives=[""], archive_stamps=[before])
    _add_members(listing, 0, "", "", images)
    bar.update(len(images))
    return _index(listing)


def _scan_list(file: str, limit: int | None, bar: tqdm[Any]) -> Index:
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
    if limit is not None and len(paths) > limit:
        raise TooMany
    folder = os.path.dirname(file)
    for path, exists in zip(paths, _in_threads(lambda path: os.path.isfile(os.path.join(folder, path)), paths), strict=True):
        if not exists:
            raise FileNotFoundError(f"{path}, listed in {file}, does not exist in {folder or '.'}: correct or remove the line")
    bar.update(len(paths))
    names, watched = Strings.of(paths), Strings.of([os.path.basename(file)])
    return Index(names, counts=np.array([len(names)], np.int64), watched=watched, stamps=np.array([before], np.int64))


def _index(listing: _Listing) -> Index:
    """Sort and pack what was found."""
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
        names=Strings.packed(names),
        groups=Strings.of(groups),
        counts=np.array([counts[group] for group in groups], np.int64),
        watched=Strings.of(listing.archives + listing.folders),
        stamps=np.array(listing.archive_stamps + listing.folder_stamps, np.int64).reshape(-1, 2),
        members=np.array(members, np.int64).reshape(-1, MEMBER),
        left_out=Strings.of(sorted(listing.compressed)),
    )
