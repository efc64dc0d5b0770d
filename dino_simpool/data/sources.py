"""Which images there are, and one of them by its number: folders, archives, class folders, text files of paths."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from dino_simpool.config import MAX_PIXELS
from dino_simpool.data.archives import (
    ARCHIVE_SUFFIXES,
    COMPRESSED_SUFFIXES,
    IMAGE_SUFFIXES,
    ArchiveReader,
    Place,
    compressed_error,
    is_compressed,
)
from dino_simpool.data.cache import load_index
from dino_simpool.data.decode import BrokenImage, EncodedImage
from dino_simpool.data.index import Index, join
from dino_simpool.data.scan import is_list, stamps
from dino_simpool.logs import say

_BYTES_PER_PIXEL = 8
"""Of an image file at most: four channels of 16 bits, not compressed."""
_ENDINGS = " ".join(IMAGE_SUFFIXES)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """The files of a data set, with labels if they came from class folders."""

    root: str
    """Folder or archive that relative paths start from; empty if they start from the current folder."""
    paths: Index | Sequence[str] | np.ndarray
    """(M,) str, kept as an Index: see index.py. `name` gives one of them."""
    labels: np.ndarray | None = None
    """(M,) int64, positions in `classes`, or None."""
    classes: tuple[str, ...] = ()
    """Names of the class folders, sorted."""
    boxes: np.ndarray | None = None
    """(M, 4) float left, top, right, bottom in pixels: the part of each image that is read, or None for whole images."""
    max_pixels: int = MAX_PIXELS
    """Images with more pixels are refused."""
    exif_orientation: bool = False
    """Turn images as their EXIF tag says."""
    _archives: ArchiveReader = field(default_factory=ArchiveReader, init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.paths, Index):
            object.__setattr__(self, "paths", Index.of(map(str, self.paths)))

    @property
    def index(self) -> Index:
        """The paths, and where those in archives lie."""
        assert isinstance(self.paths, Index)
        return self.paths

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> str:
        """The path of one image, as messages call it: a file, or ARCHIVE/PATH_INSIDE, which cannot be opened."""
        return os.path.join(self.root, self.name(index))

    def name(self, index: int) -> str:
        """The path of one image below the root: what results call it."""
        return self.index[index]

    def read_bytes(self, index: int) -> bytes:
        """The content of one image file, in an archive or not. BrokenImage names a file that cannot be read."""
        try:
            member = self.index.member(index)
            if member is None:
                with open(self.path(index), "rb") as file:
                    return file.read()
            archive, stamp, place = member
            most = 2**20 + _BYTES_PER_PIXEL * self.max_pixels  # with room for headers and colour profiles
            return self._archives.read(_below(self.root, archive), stamp, place, most=most)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise  # of this process, and not of the image
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise BrokenImage(self.path(index), reason) from error

    def encoded(self, index: int) -> EncodedImage:
        """One image as it is stored, ready to be decoded. BrokenImage as for `read_bytes`."""
        return EncodedImage(
            self.read_bytes(index), name=self.path(index), max_pixels=self.max_pixels, exif_orientation=self.exif_orientation
        )

    def read(self, index: int) -> Image.Image:
        """One image as RGB, cut to its box if there are boxes. BrokenImage names a file that cannot be read."""
        image = self.encoded(index).rgb()
        if self.boxes is None:
            return image
        left, top, right, bottom = box = tuple(round(side) for side in self.boxes[index].tolist())
        if not (left < image.width and top < image.height and (right - left) * (bottom - top) <= self.max_pixels):
            raise BrokenImage(self.path(index), f"its box {box} is not one of {image.width} x {image.height} pixels")
        return image.crop(box)

    def decoded(self, *, max_pixels: int, exif_orientation: bool) -> ImageSet:
        """The same images, read with these settings of `read_rgb`."""
        return dataclasses.replace(self, max_pixels=max_pixels, exif_orientation=exif_orientation)

    def labels_of(self, indices: Sequence[int] | np.ndarray) -> np.ndarray | None:
        """Class numbers of images."""
        return None if self.labels is None else self.labels[indices]

    def digest(self) -> str:
        """SHA-256 of the names in their order: the same for a folder that was moved as a whole, or packed into one archive."""
        return self.index.digest()

    def sizes_digest(self) -> str:
        """SHA-256 of the sizes of the files in bytes, which few files keep that are replaced under their names."""
        members = self.index.members
        sizes = members[:, 1 + Place._fields.index("unpacked")].copy() if len(members) else np.full(len(self), -1, np.int64)
        files = np.flatnonzero(sizes < 0)
        sizes[files] = stamps([self.path(index) for index in files.tolist()])[:, 1]
        return hashlib.sha256(sizes.tobytes()).hexdigest()


def find_images(roots: str | Sequence[str], *, subset_per_class: int | None = None) -> ImageSet:
    """All images of some folders, archives and text files of paths, in a fixed order, without labels.

    A folder is searched at any depth, and so are the .tar and .zip archives in it, as if they were unpacked where they lie
    (scan.py, archives.py). A text file has one path a line, relative to the file itself; empty lines and lines that start with
    # are skipped. With `subset_per_class` the first so many images of each top-level folder are taken. Raises FileNotFoundError
    for a missing folder or file, PermissionError for one that may not be read, ValueError for a source without images and for
    an archive that is damaged or compressed. How large sources are listed: cache.py.
    """
    roots = [roots] if isinstance(roots, str) else list(roots)
    if not roots or "" in roots:
        raise ValueError(
            "no images are given: set data.root to a folder of images, an archive, or a text file with one path a line"
        )
    parts = [_source(root, subset_per_class) for root in roots]
    return ImageSet(*parts[0]) if len(parts) == 1 else ImageSet("", join(parts))


def class_folder(root: str, *, subset_per_class: int | None = None) -> ImageSet:
    """Labelled images of the form root/class/image: classes are the sorted folder names, images sorted within each.

    root: a folder, or an archive of one. If there is no such folder, root.tar or root.zip stands for it. Archives in a folder
    count as unpacked there: in a folder of shards the classes are the first folders inside of them. With `subset_per_class` the
    first so many images of each class are taken. Raises FileNotFoundError for a missing folder; ValueError if there are no
    class folders, one has no images, or images lie outside of them.
    """
    root = folder_or_archive(root)
    if is_compressed(root):
        raise compressed_error(root)
    if is_list(root):
        raise FileNotFoundError(f"{root} is no existing folder: give a folder of images, or a .tar or .zip archive of one")
    _, index = _load(root)
    empty = [name for name, count in _groups(index) if name and not count]
    if empty or not len(index):
        problem = f"class folder {empty[0]} has no images" if empty else "no class folders"
        raise ValueError(f"{problem} in {root}: give a folder of the form DIR/CLASS/IMAGE, with files ending in {_ENDINGS}")
    index = _subset(root, _only_classes(root, index), subset_per_class)
    labels = np.repeat(np.arange(len(index.groups)), index.counts)
    return ImageSet(root, index, labels, tuple(index.groups))


def evenly(total: int, count: int) -> np.ndarray:
    """At most `count` of the indices 0..total-1, evenly spread from the first to the last: int64, ascending, each once."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(np.int64))


def folder_or_archive(root: str) -> str:
    """`root`, or root.tar or root.zip if only such an archive exists."""
    if not os.path.exists(root):
        for suffix in ARCHIVE_SUFFIXES + COMPRESSED_SUFFIXES:
            if os.path.isfile(root + suffix):
                return root + suffix
    return root


def _source(root: str, subset_per_class: int | None) -> tuple[str, Index]:
    """The base folder of one source, and its images."""
    if subset_per_class is not None and is_list(root):
        raise ValueError(f"{root} is a text file, without classes for subset_per_class: list only the wanted paths instead")
    base, index = _load(root)
    if not len(index):
        endings = f"at any depth, files ending in {_ENDINGS}"
        raise ValueError(f"no images in {root}: give a folder that holds, {endings}; or a text file with one path a line")
    return base, index if subset_per_class is None else _subset(root, _only_classes(root, index), subset_per_class)


def _load(root: str) -> tuple[str, Index]:
    """load_index, and what there is to say about compressed archives beside the images."""
    base, index = load_index(root)
    if len(index.left_out):
        if not len(index):
            raise compressed_error(os.path.join(root, index.left_out[0]))
        say(f"{root}: {len(index.left_out)} compressed archive(s) left out, such as {index.left_out[0]}; unpack to use them")
    return base, index


def _groups(index: Index) -> list[tuple[str, int]]:
    """(top-level folder, number of images) in the order of the images."""
    return list(zip(index.groups, index.counts.tolist(), strict=True))


def _only_classes(root: str, index: Index) -> Index:
    """The same, after making sure that all images lie in class folders."""
    loose = dict(_groups(index)).get("", 0)
    if loose:
        what = "put each archive into a folder of its class" if index.member(0) else "move or remove them"
        raise ValueError(f"{index[0]} and {loose - 1} other images in {root} lie in no class folder: {what}")
    return index


def _subset(root: str, index: Index, count: int | None) -> Index:
    """The first `count` images of each class."""
    if count is None:
        return index
    for name, images in _groups(index):
        if 0 < images < count:
            raise ValueError(f"class {name} in {root} has {images} images: subset_per_class {count} must be lower")
    return index.first_of_each_group(count)


def _below(root: str, path: str) -> str:
    return os.path.join(root, path) if path else root
