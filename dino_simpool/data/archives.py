"""Reads images in tar and zip archives at random, without unpacking.

An archive stands for the files that unpacking it would create, as Python's tarfile and zipfile see
them. A later member replaces an earlier one of the same name. Hard links and links to files are
followed; links to folders are refused. Hidden files (.x, ._x) are not images. Empty parts, "." and
".." are dropped from paths inside. A leading folder that all images share is dropped too, if every
image lies in a folder below it (`tar cf train.tar train` holds train/CLASS/IMAGE), so an archive of
a folder equals an archive of its content. A compressed tar is refused, because each image would
have to be read from the start of the file.
"""

from __future__ import annotations

import io
import os
import posixpath
import stat
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

try:
    import resource
except ImportError:  # Windows, where a process may open thousands
    resource = None  # type: ignore[assignment]

from dino_simpool.config import Exclude
from dino_simpool.files import read_at
from dino_simpool.names import SYSTEM_FOLDERS, annotations_among, is_archive, is_image, is_no_data, kind_left_out

_FILES = -1 if resource is None else resource.getrlimit(resource.RLIMIT_NOFILE)[0]  # -1: no limit
MOST_OPEN = 256 if _FILES < 0 else max(1, min(256, _FILES // 4))
"""Archives that a process keeps open: a quarter of the files it may open. Loaders need some too."""
_PLAIN = -1
"""Method of tar members, whose bytes start at the offset. Zip has ZIP_STORED and ZIP_DEFLATED."""
_COMPRESSED_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_LARGEST_HEADER, _LARGEST_DIRECTORY = 2**24, 2**30
"""Bytes of one header of a tar, and of the directory of a zip archive: 10 million names."""
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip member: signature, lengths of the name and the extra field before the data


class Place(NamedTuple):
    """Where the bytes of an image are in its archive.

    offset: of the data (tar) or of the local header (zip).   size: bytes stored.   method: _PLAIN,
    zipfile.ZIP_STORED or zipfile.ZIP_DEFLATED.   unpacked: bytes of the image file.   checksum: its
    CRC-32; -1 in a tar, which has none.
    """

    offset: int
    size: int
    method: int
    unpacked: int
    checksum: int


class TooMany(Exception):
    """There are more files than the caller's limit."""


class _Entry(NamedTuple):
    """One member of an archive; link: the path inside that it points to."""

    name: str
    place: Place
    folder: bool = False
    link: str = ""
    hard: bool = False
    """The link is another name for an earlier member."""
    refused: str = ""
    """Why its bytes cannot be read."""


def compressed_error(path: str) -> ValueError:
    """The error for a compressed tar, with what to do."""
    return ValueError(f"{path} is compressed, so single images cannot be read: make an uncompressed .tar or a .zip of it")


def list_archive(
    path: str, exclude: Exclude, folder: str = "", *, limit: float
) -> tuple[dict[str, Place], set[str], Counter[str]]:
    """The images of an archive by their path inside, the top-level folders that it creates, and how
    many files of which kind are left out.

    folder: where the archive is in the source, which the paths of `exclude` begin with.
    TooMany if it has more members than `limit`. ValueError if it is compressed, truncated or
    broken, if it holds a link to a folder with images, or if an image in it is sparse, encrypted,
    packed by an unknown method, or a link to something outside the archive.
    """
    read = _zip_entries if path.lower().endswith(".zip") else _tar_entries
    files: dict[str, _Entry] = {}
    folders: set[str] = set()
    try:
        for count, entry in enumerate(read(path)):
            if count >= limit:
                raise TooMany
            name = _inside(entry.name)
            if entry.folder:
                folders.add(name)
            elif name:
                # A hard link keeps what its target is now, perhaps itself (`tar cf x.tar d d/a`).
                files[name] = files.get(_inside(entry.link), entry) if entry.hard else entry
    except (tarfile.TarError, zipfile.BadZipFile, RuntimeError, struct.error, EOFError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} cannot be read as an archive ({error}): it is truncated or broken, create it again"
        ) from error
    images = {}
    left_out: Counter[str] = Counter()
    annotations = annotations_among(files)
    common = _common_folder([name for name in files if is_image(name) and not _no_data(name)]) if exclude.patterns else ""

    def no_data(name: str) -> str:
        return _no_data(name) or exclude.which(posixpath.join(folder, name.removeprefix(common)))

    for name in files:
        if kind := no_data(name):
            left_out[kind] += 1
            continue
        folders.add(posixpath.dirname(name))
        if name in annotations:
            left_out["." + posixpath.basename(name).partition(".")[2]] += 1
        elif is_image(name):
            images[name] = _target(path, name, files)
        elif not is_archive(name):
            left_out[kind_left_out(name)] += 1
    with_images = {f"{posixpath.dirname(name)}/" for name in images}
    for name, entry in files.items():
        end = _end_of_links(name, files) if entry.link and not _no_data(name) else ""
        # A link to a folder that contains the link adds no images.
        adds = end and end not in files and not name.startswith(f"{end}/")
        if adds and any(folder.startswith(f"{end}/") for folder in with_images):
            raise ValueError(
                f"{path}/{name} is a link to the folder {end}: pack the folder itself there, or give it as a separate source"
            )
    inner = [name for name in files if is_archive(name)]
    if inner and not images:
        raise ValueError(
            f"{path} holds archives such as {inner[0]} and no images: unpack it and give the folder that holds them"
        )
    prefix = _common_folder(images)
    tops = {name.removeprefix(prefix).partition("/")[0] for name in folders if name.startswith(prefix) and not no_data(name)}
    return {name.removeprefix(prefix): place for name, place in images.items()}, tops - {""}, left_out


class _Headers(io.FileIO):
    """An archive of which only headers are read, none larger than `largest`, whatever it says."""

    def __init__(self, path: str, largest: int) -> None:
        super().__init__(path)
        self.largest = largest

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > self.largest:
            raise EOFError(f"a header has {size:,} bytes")
        return super().read(-1 if size is None else size) or b""


def _tar_entries(path: str) -> Iterator[_Entry]:
    # Unbuffered, because only headers are read and the data between them is skipped.
    with _Headers(path, _LARGEST_HEADER) as file:
        total = os.fstat(file.fileno()).st_size
        if file.read(8).startswith(_COMPRESSED_MAGIC):
            raise compressed_error(path)
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # otherwise it would keep them all
                if member.isreg() and not member.issparse() and member.offset_data + member.size > total:
                    raise tarfile.ReadError(f"{member.name} goes beyond the end of the file")
                place = Place(member.offset_data, member.size, _PLAIN, member.size, -1)
                link = member.linkname if member.islnk() else ""
                if member.issym():
                    link = posixpath.join(posixpath.dirname(member.name), member.linkname)
                refused = "it is sparse" if member.issparse() else "" if member.isreg() or link else "it is a device"
                yield _Entry(member.name, place, member.isdir(), link, member.islnk(), refused)
            # tarfile accepts a file that ends early or continues with something else.
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no end mark after {archive.offset} bytes")


def _zip_entries(path: str) -> Iterator[_Entry]:
    with _Headers(path, _LARGEST_DIRECTORY) as file, zipfile.ZipFile(file) as archive:
        total = os.fstat(file.fileno()).st_size
        for member in archive.infolist():
            refused = ""
            if member.flag_bits & 1:
                refused = "it is encrypted"
            elif member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                refused = f"it is packed by method {member.compress_type}; stored and deflated are known"
            elif member.file_size > 1100 * member.compress_size + 1024:  # deflate shrinks by 1,032 at most
                refused = f"it claims {member.file_size:,} bytes, more than its {member.compress_size:,} can hold"
            if not 0 <= member.header_offset <= total - member.compress_size:
                raise zipfile.BadZipFile(f"{member.filename} goes beyond the end of the file")
            link = ""
            if stat.S_ISLNK(member.external_attr >> 16) and member.file_size > 4096:
                refused = f"it is a link of {member.file_size:,} bytes"
            elif stat.S_ISLNK(member.external_attr >> 16) and not refused:
                link = posixpath.join(posixpath.dirname(member.filename), os.fsdecode(archive.read(member)))
            place = Place(member.header_offset, member.compress_size, member.compress_type, member.file_size, member.CRC)
            yield _Entry(member.filename, place, member.is_dir(), link, refused=refused)


def _inside(name: str) -> str:
    """The path below the archive: ./a, /a and ../a all become a."""
    return "/".join(part for part in name.split("/") if part not in ("", ".", ".."))


def _no_data(name: str) -> str:
    """The system folder that a path lies in, or "hidden"; "" if it may be data."""
    parts = name.split("/")
    system = next((part for part in parts[:-1] if part.lower() in SYSTEM_FOLDERS), "")
    return f"in {system}" if system else "hidden" * any(map(is_no_data, parts))


def _target(path: str, name: str, files: dict[str, _Entry]) -> Place:
    """Where the bytes of an image are, after following links."""
    entry = files.get(_end_of_links(name, files))
    if entry is None:
        link = files[name].link
        raise ValueError(f"{path}/{name} is a link to {link}, which is not a file in the archive: pack the image itself")
    if entry.refused:
        raise ValueError(f"{path}/{name} cannot be read, {entry.refused}: pack it again as an ordinary file")
    return entry.place


def _end_of_links(name: str, files: dict[str, _Entry]) -> str:
    """The path at the end of a chain of links, which may be missing; "" if they form a circle."""
    seen: set[str] = set()
    while name not in seen and (entry := files.get(name)) is not None and entry.link:
        seen.add(name)
        name = _inside(posixpath.normpath(entry.link))
    return "" if name in seen else name


def _common_folder(images: Iterable[str]) -> str:
    """The leading folder that all images share, with its "/", if each lies in a folder below it."""
    leading = {name.partition("/")[0] if name.count("/") >= 2 else "" for name in images}
    return f"{leading.pop()}/" if len(leading) == 1 and "" not in leading else ""


@dataclass(frozen=True, eq=False)
class _Descriptor:
    """An open file. It closes when the last user, perhaps another thread, drops it."""

    number: int

    def __del__(self) -> None:
        os.close(self.number)


class ArchiveReader:
    """Reads archive members. A process opens an archive at its first read, and then keeps it open.

    Each read gives its own offset, so threads and forked processes can share open files. A copy
    sent to another process has no open files.
    """

    def __init__(self) -> None:
        self._open: dict[str, _Descriptor] = {}

    def __reduce__(self) -> tuple[type[ArchiveReader], tuple[()]]:
        return ArchiveReader, ()

    def read(self, path: str, stamp: tuple[int, int], place: Place, *, most: int) -> bytes:
        """The bytes of one image. OSError if the archive cannot be read.

        stamp: of the archive when it was listed (scan.stamp).   ValueError if it has changed since
        or is broken there, or if the image has more than `most` bytes.
        """
        if place.unpacked > most:
            raise ValueError(
                f"it has {place.unpacked:,} bytes, more than an image of max_pixels; raise max_pixels if it is valid"
            )
        archive = self._file(path, stamp)  # held until the end, because it closes when it is no longer used
        file, offset = archive.number, place.offset
        if place.method != _PLAIN:
            header = read_at(file, _LOCAL_HEADER.size, offset)
            if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
                raise ValueError("no file starts where the zip archive says")
            _, name_length, extra_length = _LOCAL_HEADER.unpack(header)
            offset += _LOCAL_HEADER.size + name_length + extra_length
        data = read_at(file, place.size, offset)
        if len(data) != place.size:
            raise ValueError(f"the archive ends {place.size - len(data)} bytes too early")
        if place.method == zipfile.ZIP_DEFLATED:
            try:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, place.unpacked + 1)
            except zlib.error as error:
                raise ValueError(f"its compressed data is broken, {error}") from error
        if place.checksum >= 0 and (len(data), zlib.crc32(data)) != (place.unpacked, place.checksum):
            raise ValueError("its bytes are broken: they do not match the checksum in the zip archive")
        return data

    def _file(self, path: str, stamp: tuple[int, int]) -> _Descriptor:
        file = self._open.get(path)
        if file is None:
            file = _Descriptor(os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0)))
            now = os.fstat(file.number)
            if (now.st_mtime_ns, now.st_size) != stamp:
                raise ValueError("the archive has changed since its files were listed; start again")
            # The dict is replaced, not changed, because other threads use it. If two add at once,
            # one of the files is opened again.
            kept = self._open
            self._open = {**(kept if len(kept) < MOST_OPEN else {}), path: file}
        return file
