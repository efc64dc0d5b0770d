"""Which images there are, and one of them by its number: folders, class folders, text files of paths."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dino_simpool.config import MAX_PIXELS
from dino_simpool.data.decode import read_rgb

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".gif")
_ENDINGS = " ".join(IMAGE_SUFFIXES)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """The files of a data set, with labels if they came from class folders."""

    root: str
    """Folder that relative paths start from; empty if they start from the current one."""
    paths: np.ndarray
    """(M,) str."""
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

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> str:
        """The path of one image, to be opened."""
        return os.path.join(self.root, str(self.paths[index]))

    def name(self, index: int) -> str:
        """The path of one image below the root: what results call it."""
        return str(self.paths[index])

    def encoded(self, index: int) -> str | bytes:
        """One image as it is stored, for `read_rgb` and `examine`: the path of its file, or the bytes of a file."""
        return self.path(index)

    def read(self, index: int) -> Image.Image:
        """One image as RGB, cut to its box if there are boxes. BrokenImage names a file that cannot be read."""
        image = read_rgb(
            self.encoded(index), name=self.path(index), max_pixels=self.max_pixels, exif_orientation=self.exif_orientation
        )
        return image if self.boxes is None else image.crop(tuple(round(side) for side in self.boxes[index].tolist()))

    def decoded(self, *, max_pixels: int, exif_orientation: bool) -> ImageSet:
        """The same images, read with these settings of `read_rgb`."""
        return dataclasses.replace(self, max_pixels=max_pixels, exif_orientation=exif_orientation)

    def digest(self) -> str:
        """SHA-256 of the paths below the root in their order: the same for a folder that was moved as a whole."""
        return hashlib.sha256("\n".join(self.paths.tolist()).encode("utf-8", "surrogateescape")).hexdigest()


def find_images(roots: str | Sequence[str], *, subset_per_class: int | None = None) -> ImageSet:
    """All images below some folders and in some text files of paths, in a fixed order, without labels.

    A text file has one path a line, relative to the file itself; empty lines and lines that start with # are skipped. With
    `subset_per_class` the first so many images of each top-level folder are taken. Raises FileNotFoundError for a missing
    folder or file, PermissionError for one that may not be read, ValueError for a source without images.
    """
    roots = [roots] if isinstance(roots, str) else list(roots)
    if not roots or "" in roots:
        raise ValueError("no images are given: set data.root to a folder of images, or to a text file with one path a line")
    parts = [
        _read_list(root, subset_per_class) if os.path.isfile(root) else _read_folder(root, subset_per_class) for root in roots
    ]
    if len(parts) == 1:
        return ImageSet(parts[0][0], np.array(parts[0][1]))
    return ImageSet("", np.array([os.path.join(folder, path) for folder, paths in parts for path in paths]))


def class_folder(root: str, *, subset_per_class: int | None = None) -> ImageSet:
    """Labelled images of the form root/class/image: classes are the sorted folder names, images sorted within each.

    With `subset_per_class` the first so many images of each class are taken. Raises FileNotFoundError for a missing folder;
    ValueError if there are no class folders, one has no images, or images lie outside of them.
    """
    paths = _by_class(root)
    empty = [name for name in _visible_folders(root) if name not in paths]
    if empty or not paths:
        problem = f"class folder {empty[0]} has no images" if empty else "no class folders"
        raise ValueError(f"{problem} in {root}: give a folder of the form DIR/CLASS/IMAGE, with files ending in {_ENDINGS}")
    paths = _only_classes(root, paths)
    if subset_per_class is not None:
        paths = _first_of_each(root, paths, subset_per_class)
    labels = np.repeat(np.arange(len(paths)), [len(members) for members in paths.values()])
    return ImageSet(root, np.array([path for members in paths.values() for path in members]), labels, tuple(paths))


def _read_folder(root: str, subset_per_class: int | None) -> tuple[str, list[str]]:
    """The folder itself and the paths of its images, relative to it."""
    paths = _by_class(root)
    if not paths:
        endings = f"at any depth, files ending in {_ENDINGS}"
        raise ValueError(f"no images in {root}: give a folder that holds, {endings}; or a text file with one path a line")
    if subset_per_class is not None:
        paths = _first_of_each(root, _only_classes(root, paths), subset_per_class)
    return root, [path for members in paths.values() for path in members]


def _read_list(file: str, subset_per_class: int | None) -> tuple[str, list[str]]:
    """The folder of a text file and the paths that it names, each of which must exist."""
    if file.lower().endswith(IMAGE_SUFFIXES):
        raise ValueError(f"{file} is one image: give the folder that holds it, or a text file with one path a line")
    if subset_per_class is not None:
        raise ValueError(f"{file} is a text file, without classes for subset_per_class: list only the wanted paths instead")
    try:
        lines = [line.strip() for line in Path(file).read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8: give a folder, or a text file with one path a line") from error
    paths = [line for line in lines if line and not line.startswith("#")]
    if not paths:
        raise ValueError(f"{file} names no images: write one path a line, relative to the file or absolute")
    folder = os.path.dirname(file)
    for path in paths:
        if not os.path.isfile(os.path.join(folder, path)):
            raise FileNotFoundError(
                f"{path}, listed in {file}, does not exist from {folder or '.'}: correct or remove the line"
            )
    return folder, paths


def _by_class(root: str) -> dict[str, list[str]]:
    """Image paths below `root` and relative to it, by top-level folder ("" for those in none).

    The order is ImageFolder's: classes sorted, in a class the folders sorted, in a folder the files sorted.
    """
    if not os.path.isdir(root):
        raise FileNotFoundError(f"{root} is no existing folder: give a folder of images")
    found: list[tuple[str, str]] = []
    try:
        _collect(root, "", frozenset([os.path.realpath(root)]), found)
    except PermissionError as error:
        raise PermissionError(f"{error.filename} may not be read: change its permissions or give another folder") from error
    paths: dict[str, list[str]] = {}
    for folder, name in sorted(found):
        paths.setdefault(folder.split(os.sep)[0], []).append(os.path.join(folder, name))
    return dict(sorted(paths.items()))


def _collect(root: str, folder: str, ancestors: frozenset[str], found: list[tuple[str, str]]) -> None:
    """Append (folder, name) of each image at any depth; hidden files and folders are skipped, links are followed."""
    with os.scandir(os.path.join(root, folder)) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                real = os.path.realpath(entry.path)
                if real not in ancestors:  # a link to a folder that contains it would never end
                    _collect(root, os.path.join(folder, entry.name), ancestors | {real}, found)
            elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                found.append((folder, entry.name))


def _visible_folders(root: str) -> list[str]:
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


def _only_classes(root: str, paths: dict[str, list[str]]) -> dict[str, list[str]]:
    """The same, after making sure that all images lie in class folders."""
    if "" in paths:
        raise ValueError(
            f"{paths[''][0]} and {len(paths['']) - 1} other images in {root} lie in no class folder: move or remove them"
        )
    return paths


def _first_of_each(root: str, paths: dict[str, list[str]], count: int) -> dict[str, list[str]]:
    """The first `count` paths of each class."""
    for name, members in paths.items():
        if len(members) < count:
            raise ValueError(f"class {name} in {root} has {len(members)} images: subset_per_class {count} must be lower")
    return {name: members[:count] for name, members in paths.items()}
