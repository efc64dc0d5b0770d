"""What a layout is: where a data set is, how it is read, how many images it has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dino_simpool.data.sources import ImageSet


class Problems(list[str]):
    """What is wrong with a data set, one line each; in `notes` what is only useful to know."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []


Parts = dict[str, ImageSet]
"""The parts of a data set by name, such as queries and gallery."""


@dataclass(frozen=True)
class Layout:
    """One public data set on disk."""

    name: str
    read: Callable[[Path, Problems], Parts]
    """Reads the data set in its folder. Adds all problems; returns the parts that could be read."""
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


def load(name: str, root: str, layouts: Mapping[str, Layout]) -> Parts:
    """The parts of a data set. ValueError with the first problem, in one line."""
    if name not in layouts:
        raise ValueError(f"there is no layout {name} here: known are {', '.join(layouts)}")
    problems = Problems()
    parts = layouts[name].read(layouts[name].home(root), problems)
    if problems:
        more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
        raise ValueError(problems[0] + more)
    return parts


def part_counts(parts: Parts) -> dict[str, int]:
    """The number of images of each part, and of classes in all parts if there are classes."""
    classes = {name for images in parts.values() for name in images.classes}
    return {name: len(images) for name, images in parts.items()} | ({"classes": len(classes)} if classes else {})
