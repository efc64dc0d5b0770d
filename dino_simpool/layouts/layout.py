"""What a layout is, and how the lists of a data set are read and checked against its files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dino_simpool.data import ImageSet, composed
from dino_simpool.names import is_image

SHOWN = 20
"""The number of missing files that are named."""
Parts = dict[str, ImageSet]
"""The parts of a data set by name, such as queries and gallery."""


class Problems(list[str]):
    """What is wrong with a data set, one line each; in `notes` what is only useful to know."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []


@dataclass(frozen=True)
class Layout:
    """One public data set on disk."""

    name: str
    read: Callable[[Path, Problems], Parts]
    """Reads the data set in its folder. Adds all problems; returns the parts that could be read.
    A ValueError or OSError is one more problem."""
    folder: str = ""
    """Name of its folder. Empty: the root itself."""
    content: str = ""
    """Something in this folder, by which the folder is recognized as the root."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """The official numbers of images of each part, and of `classes`. If the queries are their own
    gallery, `queries` is the number of test images."""

    def home(self, root: str) -> Path:
        """The folder of the data set: root/folder, or root itself if it has the content."""
        inside = Path(root, self.folder)
        return Path(root) if not inside.is_dir() and Path(root, self.content).exists() else inside

    def parts(self, root: str) -> tuple[Parts, Problems]:
        """The parts that could be read, and all problems."""
        problems = Problems()
        try:
            return self.read(self.home(root), problems), problems
        except (ValueError, OSError) as error:
            problems.append(str(error))
            return {}, problems


def load(name: str, root: str, layouts: Mapping[str, Layout]) -> Parts:
    """The parts of a data set. ValueError with the first problem, in one line."""
    if name not in layouts:
        raise ValueError(f"there is no layout {name} here: known are {', '.join(layouts)}")
    parts, problems = layouts[name].parts(root)
    if problems:
        more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
        raise ValueError(problems[0] + more)
    return parts


def part_counts(parts: Parts) -> dict[str, int]:
    """The number of images of each part, and of classes in all parts if there are classes."""
    classes = {composed(name) for images in parts.values() for name in images.classes}
    return {name: len(images) for name, images in parts.items()} | ({"classes": len(classes)} if classes else {})


def read_table(
    path: Path, columns: int, problems: Problems, *, header: Sequence[str] = (), counted: bool = False
) -> list[list[str]]:
    """The rows of a text file with columns.

    header: the names in the line before the rows.   counted: the first line is the number of rows.
    """
    if not path.is_file():
        problems.append(f"{path} is missing: get it with the data set")
        return []
    lines = [line.split() for line in path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()]
    start = int(counted) + bool(header)
    rows = [row for row in lines[start:] if row]
    if header and lines[start - 1 : start] != [list(header)]:
        problems.append(f"{path} has no line {start} with the names {' '.join(header)}: get it again")
        return []
    if counted and lines[0] != [str(len(rows))]:
        problems.append(f"{path} announces {' '.join(lines[0])} images and lists {len(rows):,}: get it again")
    wrong = [i for i, row in enumerate(lines[start:], start + 1) if row and len(row) != columns]
    if wrong:
        problems.append(f"{path}, line {wrong[0]}: {len(lines[wrong[0] - 1])} columns instead of {columns}")
        return []
    if not rows:
        problems.append(f"{path} lists no images: get it again")
    return rows


def listed_images(
    folder: Path, source: str, chosen: dict[str, list[tuple[str, str]]], problems: Problems, *, named: Sequence[str]
) -> Parts:
    """The image set of each part. Missing files and paths that are listed twice are problems.

    chosen: (path below folder, class or "") for the images of each part.   source: the file that
    names them.   named: all images that the lists of the data set name, also of other parts; none
    if unknown.
    """
    listed = [pair for pairs in chosen.values() for pair in pairs]
    inside = {path[: path.rfind("/") + 1] for path in (*named, *(path for path, _ in listed))}
    there = {each + name for each in inside if (folder / each).is_dir() for name in os.listdir(folder / each)}
    names = {name for _, name in listed if name}
    classes = tuple(sorted(names, key=lambda name: (int(name) if name.isdecimal() else 2**62, name)))
    number = {name: i for i, name in enumerate(classes)}
    parts = {}
    for part, pairs in chosen.items():
        if not pairs:
            problems += [] if problems else [f"{folder / source} names no {part}"]
            continue
        paths = [path for path, _ in pairs]
        labels = np.array([number[name] for _, name in pairs], np.int64) if classes else None
        parts[part] = ImageSet(str(folder), np.array(paths), labels, classes)
        if len(set(paths)) < len(paths):
            twice = Counter(paths).most_common(1)[0][0]
            problems.append(f"{folder / source} names {twice} more than once in its {part}: it would find itself")
        if missing := [path for path in paths if path not in there]:
            of = f"{part}: {len(missing):,} of {len(paths):,} images that {source} names"
            others = f", then {', '.join(missing[1:SHOWN])}" if len(missing) > 1 else ""
            more = f" and {len(missing) - SHOWN:,} more" if len(missing) > SHOWN else ""
            problems.append(f"{of} are missing, the first {folder / missing[0]}{others}{more}")
    visible = (path for path in there - set(named) if not path.rpartition("/")[2].startswith("."))
    extra = sorted(path for path in visible if is_image(path))
    if named and extra:
        problems.notes.append(f"{len(extra):,} images that no list names are not used, the first {folder / extra[0]}")
    return parts
