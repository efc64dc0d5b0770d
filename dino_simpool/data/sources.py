"""Sets of images, read by number: from folders, archives, class folders, or text files of paths."""

from __future__ import annotations

import dataclasses
import errno
import os
import shlex
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from dino_simpool.config import DEFAULT_DECODING, DecodingSettings, Exclude
from dino_simpool.data.archives import ArchiveReader, Place, compressed_error
from dino_simpool.data.cache import load_index
from dino_simpool.data.decode import BrokenImage, EncodedImage
from dino_simpool.data.index import Index, join
from dino_simpool.data.scan import NOTHING_EXCLUDED, below, is_list, stamps
from dino_simpool.logs import say
from dino_simpool.names import is_compressed, say_left_out
from dino_simpool.paths import ENDINGS, IMAGES, folder_or_archive


@dataclass(frozen=True, eq=False)
class ImageSet:
    """The images of a data set, with class names and labels if they are in class folders."""

    root: str
    """Folder or archive that paths are relative to; empty for the current folder."""
    paths: Index | Sequence[str] | np.ndarray
    """(M,) str, stored as an Index (index.py). `name` returns one of them."""
    labels: np.ndarray | None = None
    """(M,) int64, positions in `classes`, or None if they are not stored: see `labels_of`."""
    classes: tuple[str, ...] = ()
    """Names of the class folders, sorted; empty without classes."""
    boxes: np.ndarray | None = None
    """(M, 4) float left, top, right, bottom in pixels: the part to read. None: whole images."""
    decoding: DecodingSettings = DEFAULT_DECODING
    """How files become pixels."""
    _archives: ArchiveReader = field(default_factory=ArchiveReader, init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.paths, Index):
            object.__setattr__(self, "paths", Index.of(map(str, self.paths)))

    @property
    def index(self) -> Index:
        """The paths, and the places of images in archives."""
        assert isinstance(self.paths, Index)
        return self.paths

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> str:
        """The path of one image, for messages: a file, or ARCHIVE/PATH_INSIDE."""
        return os.path.join(self.root, self.name(index))

    def name(self, index: int) -> str:
        """The path of one image relative to the root, for results."""
        return self.index[index]

    def labels_of(self, indices: Sequence[int] | np.ndarray) -> np.ndarray | None:
        """(n,) int64: the classes of n images, as positions in `classes`; None without classes."""
        if self.labels is not None:
            return self.labels[indices]
        if not self.classes:
            return None
        counts = self.index.counts
        return np.searchsorted(counts[counts > 0].cumsum(), indices, side="right")

    @property
    def max_bytes(self) -> int:
        """Larger files are not read: four uncompressed channels of 16 bits, with room for headers
        and color profiles."""
        return 2**20 + 8 * self.decoding.max_pixels

    def read_bytes(self, index: int) -> bytes:
        """The content of one image file, in an archive or not. BrokenImage if it cannot be read."""
        try:
            member = self.index.member(index)
            if member is None:
                return _read_file(self.path(index), self.max_bytes)
            archive, stamp, place = member
            return self._archives.read(below(self.root, archive), stamp, place, most=self.max_bytes)
        except (OSError, ValueError) as error:
            if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise  # a fault of this process, not of the image
            raise BrokenImage(self.path(index), getattr(error, "strerror", None) or str(error)) from error

    def header_source(self, index: int) -> str | bytes:
        """Where `decode.open_image` reads a header: the path of a file, or the bytes of one in an
        archive. BrokenImage as for `read_bytes`."""
        if self.index.member(index) is not None:
            return self.read_bytes(index)
        path = self.path(index)
        try:
            _check_file(os.stat(path), self.max_bytes)
        except (OSError, ValueError) as error:
            raise BrokenImage(path, getattr(error, "strerror", None) or str(error)) from error
        return path

    def encoded(self, index: int) -> EncodedImage:
        """One image as stored, ready to be decoded. BrokenImage as for `read_bytes`."""
        return EncodedImage(self.read_bytes(index), self.path(index), self.decoding)

    def read(self, index: int) -> Image.Image:
        """One image as RGB, cropped to its box, if any. BrokenImage if it cannot be read."""
        return self.decoded(index, self.encoded(index))

    def decoded(self, index: int, file: EncodedImage) -> Image.Image:
        """`read`, with the file that `encoded` has read."""
        image = file.rgb()
        if self.boxes is None:
            return image
        left, top, right, bottom = box = tuple(round(side) for side in self.boxes[index].tolist())
        if not (left < image.width and top < image.height and (right - left) * (bottom - top) <= self.decoding.max_pixels):
            raise BrokenImage(self.path(index), f"its box {box} does not fit into {image.width} x {image.height} pixels")
        return image.crop(box)

    def with_decoding(self, decoding: DecodingSettings) -> ImageSet:
        """The same images, decoded in this way."""
        return dataclasses.replace(self, decoding=decoding)

    def digest(self) -> str:
        """SHA-256 of the names in order: the same after moving or packing a folder."""
        return self.index.digest()

    def sizes(self, rows: slice = slice(None)) -> np.ndarray:
        """(n,) int64: bytes of the files of all images, or some. They usually change when files are
        replaced."""
        numbers = np.arange(len(self))[rows]
        members = self.index.members
        sizes = (
            members[rows, 1 + Place._fields.index("unpacked")].copy() if len(members) else np.full(len(numbers), -1, np.int64)
        )
        files = np.flatnonzero(sizes < 0)
        sizes[files] = stamps([self.path(index) for index in numbers[files].tolist()])[:, 1]
        return sizes


def find_images(
    roots: str | Sequence[str], exclude: Exclude = NOTHING_EXCLUDED, *, subset_per_class: int | None = None
) -> ImageSet:
    """All images of one or more folders, archives and text files of paths, in a fixed order.

    Folders are searched at any depth; the .tar and .zip archives in them count as unpacked there. A
    text file has one path per line, relative to the file (lists.py). An image file is a source of
    one. What is left out is said. `subset_per_class` takes the first N images of each top-level
    folder. If all images of a single source lie in top-level folders, these are the `classes`;
    `labels` are not stored.
    ValueError for a source without images, and the errors of `scan.scan`.
    """
    roots = [roots] if isinstance(roots, str) else list(roots)
    if not roots or "" in roots:
        raise ValueError(
            "no images are given: set data.root to a folder of images, an archive, or a text file with one path per line"
        )
    parts = [_source(root, exclude, subset_per_class) for root in roots]
    if len(parts) > 1:
        return ImageSet("", join(parts))
    [(base, index)] = parts
    folders = tuple(name for name, count in index.images_per_group().items() if count)
    return ImageSet(base, index, classes=() if "" in folders else folders)


def class_folder(root: str, exclude: Exclude = NOTHING_EXCLUDED, *, subset_per_class: int | None = None) -> ImageSet:
    """Labeled images of the form root/class/image, in sorted order.

    root: a folder, or an archive of one; if there is none, root.tar or root.zip. Archives in a
    folder count as unpacked there: in a folder of shards, the classes are the top-level folders
    inside the shards. `subset_per_class` takes the first N images of each class.
    FileNotFoundError for a missing folder; ValueError if there are no class folders, one has no
    images, two have the same `composed` name, or images lie outside of them.
    """
    root = folder_or_archive(root)
    if is_compressed(root):
        raise compressed_error(root)
    if is_list(root):
        raise FileNotFoundError(f"{root} is not a folder: give a folder of images, or a .tar or .zip archive of one")
    _, index = _load(root, exclude)
    empty = [name for name, count in index.images_per_group().items() if name and not count]
    if empty or not len(index):
        problem = f"class folder {empty[0]} has no images" if empty else "no class folders"
        raise ValueError(f"{problem} in {root}: give a folder of the form DIR/CLASS/IMAGE, with files ending in {ENDINGS}")
    index = _classes_only(root, index, subset_per_class)
    if twins := same_names(index.groups):
        raise ValueError(f"{twins} in {root}: put their images into one folder")
    labels = np.repeat(np.arange(len(index.groups)), index.counts)
    return ImageSet(root, index, labels, tuple(index.groups))


def composed(name: str) -> str:
    """A class name as it is compared: in Unicode's composed form (NFC). File systems differ in how
    they store an accent."""
    return unicodedata.normalize("NFC", name)


def same_names(names: Iterable[str]) -> str:
    """The first two names that differ only in how accents are stored, in words; "" for none."""
    seen: dict[str, str] = {}
    for name in names:
        if (other := seen.setdefault(composed(name), name)) != name:
            return f"class folders {other!a} and {name!a} have one name, with its accents stored in two ways"
    return ""


def evenly(total: int, count: int) -> np.ndarray:
    """At most `count` of 0..total-1, evenly spread from first to last: int64, ascending, unique."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(np.int64))


def _source(root: str, exclude: Exclude, subset_per_class: int | None) -> tuple[str, Index]:
    """The base folder of one source, and the index of its images."""
    if subset_per_class is not None and is_list(root):
        raise ValueError(f"{root} is a text file, without classes for subset_per_class: list only the paths you want")
    base, index = _load(root, exclude)
    if not len(index):
        left_out = f" (left out: {say_left_out(Counter(index.left_out))})" if index.left_out else ""
        raise ValueError(f"no images in {root}{left_out}: give {IMAGES}")
    return base, index if subset_per_class is None else _classes_only(root, index, subset_per_class)


def _load(root: str, exclude: Exclude) -> tuple[str, Index]:
    """load_index, with messages about what is left out."""
    base, index = load_index(root, exclude)
    if len(index.compressed):
        if not len(index):
            raise compressed_error(os.path.join(root, index.compressed[0]))
        say(f"{root}: {len(index.compressed)} compressed archive(s) skipped, such as {index.compressed[0]}; unpack to use them")
    if index.left_out and len(index):
        say(f"{root}: {len(index):,} images; left out: {say_left_out(Counter(index.left_out))}")
    for pattern in exclude.patterns:
        if f"excluded by {pattern}" not in index.left_out:
            say(f"warning: {root}: nothing matches exclude {pattern}")
    return base, index


def _classes_only(root: str, index: Index, subset_per_class: int | None) -> Index:
    """The images, or the first of each class. ValueError if some are not in a class folder."""
    images = index.images_per_group()
    if loose := images.get("", 0):
        member = index.member(0)
        what = "put each archive into a folder for its class" if member else "move or remove them"
        if ".cls" in index.left_out and (member is None or below(root, member[0]).lower().endswith(".tar")):
            what = _sort_by_cls(root, in_shards=member is not None)
        raise ValueError(f"{index[0]} and {loose - 1} other images in {root} are not in a class folder: {what}")
    if subset_per_class is None:
        return index
    for name, count in images.items():
        if 0 < count < subset_per_class:
            raise ValueError(f"class {name} in {root} has {count} images: subset_per_class {subset_per_class} must be lower")
    return index.first_of_each_group(subset_per_class)


def _sort_by_cls(root: str, *, in_shards: bool) -> str:
    """How to sort WebDataset's samples, whose classes are in .cls files, into class folders. Two
    shards may have samples of one name."""
    source = os.path.abspath(root)
    target = f"{os.path.splitext(source)[0] if os.path.isfile(source) else source}_classes"
    into, given = shlex.quote(target), shlex.quote(source)
    shards = f"{given}/*.tar" if os.path.isdir(source) else given
    each = 'find . -name "*.cls" | while read -r c; do d={into}/"$(cat "$c")"/{part}"$(dirname "$c")"; mkdir -p "$d"; '
    if in_shards:
        command = (
            f'for t in {shards}; do s=$(basename "$t"); mkdir -p {into}/."$s" && cd {into}/."$s" && tar xf "$t" && '
            + each.format(into=into, part='"$s"/')
            + 'mv "${c%.cls}".* "$d"; done; done'
        )
    else:
        command = f"cd {given} && " + each.format(into=into, part="") + 'cp "${c%.cls}".* "$d"; done'
    return f"their classes are in .cls files. Run `{command}`, then give {into}"


def _read_file(path: str, most: int) -> bytes:
    """The bytes of a file that has at most `most`. ValueError for more, and for what is no file."""
    file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))  # a pipe would wait
    with open(file, "rb") as opened:
        found = os.fstat(file)
        _check_file(found, most)
        content = opened.read(found.st_size + 1)
    if len(content) > found.st_size:  # as files of /proc, which say that they are empty
        raise ValueError(f"it has more than the {found.st_size:,} bytes that it says: it is still written, or no ordinary file")
    return content


def _check_file(found: os.stat_result, most: int) -> None:
    """ValueError if a file may have no end or has more than `most` bytes."""
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is a pipe, a device or a folder, not a file")
    if found.st_size > most:
        raise ValueError(
            f"it has {found.st_size:,} bytes, more than the {most:,} of an image of max_pixels; raise that if it is valid"
        )
