"""Images in tar and zip archives: where each of them lies, and its bytes, read at random and without unpacking.

An archive stands for the files that unpacking it would make, as Python's tarfile and zipfile see them: a later member replaces
an earlier one of the same name, hard links and links to files and folders are followed, hidden files (.x, ._x) are no images.
Of a path inside, empty parts, "." and ".." are dropped. One leading folder that all images share is dropped too, if every image
lies in a folder below it (`tar cf train.tar train` holds train/CLASS/IMAGE): archives of a folder and of its content are the
same.
A compressed tar has to be read from its start for each image, and is refused.
"""

from __future__ import annotations

import os
import posixpath
import resource
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import NamedTuple

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")
ARCHIVE_SUFFIXES = (".tar", ".zip")
COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".tar.lz4")

_FILES = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
MOST_OPEN = 256 if _FILES == resource.RLIM_INFINITY else max(1, min(256, _FILES // 4))
"""Archives that one process keeps open: a quarter of the files that it may open, since the loaders need some of them."""
_PLAIN = -1
"""Method of a tar member: its bytes lie at the offset. Of zip members: zipfile.ZIP_STORED or ZIP_DEFLATED."""
_COMPRESSED_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip member: signature, lengths of name and extra field, which precede the data


class Place(NamedTuple):
    """Where the bytes of an image lie in its archive."""

    offset: int
    """Of the data (tar) or of the local header (zip)."""
    size: int
    """Bytes stored."""
    method: int
    """_PLAIN, zipfile.ZIP_STORED or zipfile.ZIP_DEFLATED."""
    unpacked: int
    """Bytes of the image file."""
    checksum: int
    """CRC-32 of these; -1 in a tar, which has none."""


class TooMany(Exception):
    """More files than the caller wanted to see."""


class _Entry(NamedTuple):
    """One member as the archive has it. link: path inside that it points to; hard: as another name of what is there by now;
    refused: why its bytes cannot be read."""

    name: str
    place: Place
    folder: bool = False
    link: str = ""
    hard: bool = False
    refused: str = ""


def is_compressed(name: str) -> bool:
    """Whether a file is called like a compressed tar."""
    return name.lower().endswith(COMPRESSED_SUFFIXES)


def compressed_error(path: str) -> ValueError:
    """What to do with a compressed tar."""
    return ValueError(f"{path} is compressed, so that no image can be read alone: make an uncompressed .tar or a .zip of it")


def list_archive(path: str, *, limit: int | None = None) -> tuple[dict[str, Place], set[str]]:
    """The images of an archive by their path inside, and the top-level folders that it makes.

    limit: TooMany is raised beyond so many members. ValueError if the archive is compressed, truncated or damaged, or if an
    image in it is sparse, encrypted, packed by an unknown method, or a link to something that is not in the archive.
    """
    read = _zip_entries if path.lower().endswith(".zip") else _tar_entries
    files: dict[str, _Entry] = {}
    folders: set[str] = set()
    try:
        for count, entry in enumerate(read(path)):
            if limit is not None and count >= limit:
                raise TooMany
            name = _inside(entry.name)
            if entry.folder:
                folders.add(name)
            elif name:
                # A hard link keeps what its target is now, and may be to itself (`tar cf x.tar d d/a` packs d/a twice).
                files[name] = files.get(_inside(entry.link), entry) if entry.hard else entry
    except (tarfile.TarError, zipfile.BadZipFile, RuntimeError, struct.error, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as an archive ({error}): it is truncated or damaged, make it anew") from error
    images = {}
    for name in files:
        folders.add(posixpath.dirname(name))
        if name.lower().endswith(IMAGE_SUFFIXES) and not _hidden(name):
            images[name] = _target(path, name, files)
    inner = [name for name in files if name.lower().endswith(ARCHIVE_SUFFIXES)]
    if inner and not images:
        raise ValueError(f"{path} holds archives such as {inner[0]} and no images: unpack it and give the folder of these")
    images |= _in_linked_folders(images, files)
    folders |= {posixpath.dirname(name) for name in images}
    return _without_common_folder(images, {folder for folder in folders if folder and not _hidden(folder)})


def _tar_entries(path: str) -> Iterator[_Entry]:
    # Unbuffered: only headers are read, and the data between them is skipped.
    with open(path, "rb", buffering=0) as file:
        total = os.fstat(file.fileno()).st_size
        if os.pread(file.fileno(), 8, 0).startswith(_COMPRESSED_MAGIC):
            raise compressed_error(path)
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # or it would keep them all
                if member.isreg() and not member.issparse() and member.offset_data + member.size > total:
                    raise tarfile.ReadError(f"{member.name} goes beyond the end of the file")
                place = Place(member.offset_data, member.size, _PLAIN, member.size, -1)
                link = member.linkname if member.islnk() else ""
                if member.issym():
                    link = posixpath.join(posixpath.dirname(member.name), member.linkname)
                refused = "" if member.isreg() or link else "it is a device"
                refused = "it is sparse" if member.issparse() else refused
                yield _Entry(member.name, place, member.isdir(), link, member.islnk(), refused)
            # tarfile takes a file that ends early, or goes on with something else, for a complete one.
            if os.pread(file.fileno(), tarfile.BLOCKSIZE, archive.offset) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no end mark after {archive.offset} bytes")


def _zip_entries(path: str) -> Iterator[_Entry]:
    with zipfile.ZipFile(path) as archive:
        total = os.path.getsize(path)
        for member in archive.infolist():
            refused = ""
            if member.flag_bits & 1:
                refused = "it is encrypted"
            elif member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                refused = f"it is packed by method {member.compress_type}; stored and deflated are known"
            if member.header_offset + member.compress_size > total:
                raise zipfile.BadZipFile(f"{member.filename} goes beyond the end of the file")
            link = ""
            if stat.S_ISLNK(member.external_attr >> 16) and not refused:
                link = posixpath.join(posixpath.dirname(member.filename), os.fsdecode(archive.read(member)))
            place = Place(member.header_offset, member.compress_size, member.compress_type, member.file_size, member.CRC)
            yield _Entry(member.filename, place, member.is_dir(), link, refused=refused)


def _inside(name: str) -> str:
    """A path below the archive, whatever it says: ./a, /a and ../a are a."""
    return "/".join(part for part in name.split("/") if part not in ("", ".", ".."))


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _target(path: str, name: str, files: dict[str, _Entry]) -> Place:
    """Where the bytes of an image are, links followed."""
    entry = files.get(_end_of_links(name, files))
    if entry is None:
        raise ValueError(f"{path}/{name} is a link to {files[name].link}, no file of the archive: pack the image itself")
    if entry.refused:
        raise ValueError(f"{path}/{name} cannot be read, {entry.refused}: pack it anew as an ordinary file")
    return entry.place


def _end_of_links(name: str, files: dict[str, _Entry]) -> str:
    """The path that a link leads to in the end, a file or a folder if it is there; "" if links lead in a circle."""
    seen: set[str] = set()
    while name not in seen and (entry := files.get(name)) is not None and entry.link:
        seen.add(name)
        name = _inside(posixpath.normpath(entry.link))
    return "" if name in seen else name


def _in_linked_folders(images: dict[str, Place], files: dict[str, _Entry]) -> dict[str, Place]:
    """The images below links to folders, by the paths that they have through the link."""
    found: dict[str, Place] = {}
    for name, entry in files.items():
        folder = _end_of_links(name, files) if entry.link and not _hidden(name) else ""
        # A link to a folder that it lies in would never end.
        if folder and folder not in files and not name.startswith(f"{folder}/"):
            below = ((image, image[len(folder) :]) for image in images if image.startswith(f"{folder}/"))
            found |= {name + rest: images[image] for image, rest in below}
    return found


def _without_common_folder(images: dict[str, Place], folders: set[str]) -> tuple[dict[str, Place], set[str]]:
    """The same below the one leading folder of all images, if there is one; of the folders only the top-level ones."""
    leading = {name.partition("/")[0] for name in images}
    if len(leading) == 1 and all(name.count("/") >= 2 for name in images):
        [prefix] = leading
        images = {name[len(prefix) + 1 :]: place for name, place in images.items()}
        folders = {folder[len(prefix) + 1 :] for folder in folders if folder.startswith(prefix + "/")}
    return images, {folder.partition("/")[0] for folder in folders}


class _Descriptor:
    """An open file that is closed when nobody uses it any more: a thread may still read what another one forgets."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class ArchiveReader:
    """The bytes of archive members. A process opens an archive when it first reads from it, and then keeps it open.

    Reads name their offset, so threads and forked processes share what is open. A copy sent to a process has nothing open.
    """

    def __init__(self) -> None:
        self._open: dict[str, _Descriptor] = {}

    def __reduce__(self) -> tuple[type[ArchiveReader], tuple[()]]:
        return ArchiveReader, ()

    def read(self, path: str, stamp: tuple[int, int], place: Place, *, most: int) -> bytes:
        """The bytes of one image. stamp: mtime in ns and size of the archive when it was listed. most: bytes that it may have.

        ValueError if the archive is not the listed one any more, or is damaged there, or if the image has more bytes; OSError
        if it cannot be read.
        """
        if place.unpacked > most:
            raise ValueError(f"it has {place.unpacked:,} bytes, more than an image of max_pixels; raise that if it is one")
        descriptor = self._file(path, stamp)  # held until the end: it closes itself when nobody holds it
        file, offset = descriptor.number, place.offset
        if place.method != _PLAIN:
            header = os.pread(file, _LOCAL_HEADER.size, offset)
            if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
                raise ValueError("no file starts where the zip archive says so")
            _, name_length, extra_length = _LOCAL_HEADER.unpack(header)
            offset += _LOCAL_HEADER.size + name_length + extra_length
        data = os.pread(file, place.size, offset)
        if len(data) != place.size:
            raise ValueError(f"the archive ends {place.size - len(data)} bytes too early")
        if place.method == zipfile.ZIP_DEFLATED:
            try:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, place.unpacked + 1)
            except zlib.error as error:
                raise ValueError(f"its compressed data is damaged, {error}") from error
        if place.checksum >= 0 and (len(data), zlib.crc32(data)) != (place.unpacked, place.checksum):
            raise ValueError("its bytes are damaged: they have not the checksum that the zip archive says")
        return data

    def _file(self, path: str, stamp: tuple[int, int]) -> _Descriptor:
        file = self._open.get(path)
        if file is None:
            file = _Descriptor(path)
            now = os.fstat(file.number)
            if (now.st_mtime_ns, now.st_size) != stamp:
                raise ValueError("the archive was changed since its files were listed; start again")
            # Replaced, never changed: other threads look into it and add to it. What two add at once, one of them opens again.
            kept = self._open
            self._open = {**(kept if len(kept) < MOST_OPEN else {}), path: file}
        return file
