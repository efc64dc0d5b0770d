"""What data sets have in common whose images are named by lists: their places, counts and problems."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dino_simpool.data.sources import IMAGE_SUFFIXES, ImageSet

COUNTS: dict[str, dict[str, int]] = {
    "cub200": {"queries": 5_924, "classes": 100},
    "cars196": {"queries": 8_131, "classes": 98},
    "sop": {"queries": 60_502, "classes": 11_316},
    "inshop": {"queries": 14_218, "gallery": 12_612, "classes": 3_985},
    "roxford5k": {"database": 4_993, "queries": 70},
    "rparis6k": {"database": 6_322, "queries": 70},
    "imagenet": {"train": 1_281_167, "val": 50_000, "classes": 1_000},
}
"""The official sizes. Where the queries are their own gallery, `queries` is the number of test images."""

_HOME = {
    "cub200": ("CUB_200_2011", "images.txt"),
    "cars196": ("cars196", "cars_annos.mat"),
    "sop": ("Stanford_Online_Products", "Ebay_test.txt"),
    "inshop": ("Inshop_Clothes", "Eval"),
    "roxford5k": ("roxford5k", "jpg"),
    "rparis6k": ("rparis6k", "jpg"),
}
"""The folder of each data set, and something that lies in it."""

SHOWN = 20
"""Missing files that are named one by one."""


class Problems(list[str]):
    """What is wrong with a data set, a line each, and in `notes` what is only worth knowing."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []


Parts = dict[str, ImageSet]
Reader = Callable[[Path, Problems], Parts]


def part_counts(parts: Parts) -> dict[str, int]:
    """Images of each part, and classes of all together where there are labels."""
    counts = {name: len(images) for name, images in parts.items()}
    labels = [images.labels for images in parts.values() if images.labels is not None]
    return counts | ({"classes": len(np.unique(np.concatenate(labels)))} if labels else {})


def differing_counts(layout: str, counts: dict[str, int]) -> list[str]:
    """A line for each of the counts (as of `part_counts`) that is not the official one."""
    expected = COUNTS.get(layout, {})
    return [
        f"{layout}: {name}: {counts[name]:,} found, {number:,} expected"
        for name, number in expected.items()
        if name in counts and counts[name] != number
    ]


def home(layout: str, root: str) -> Path:
    """The folder of a data set: the one of its name in root, or root itself if that holds the content."""
    if layout not in _HOME:
        return Path(root)
    folder, content = _HOME[layout]
    inside = Path(root, folder)
    return Path(root) if not inside.is_dir() and Path(root, content).exists() else inside


def _read(layout: str, root: str, readers: dict[str, Reader]) -> Parts:
    if layout not in readers:
        raise ValueError(f"there is no layout {layout} here: known are {', '.join(readers)}")
    problems = Problems()
    parts = readers[layout](home(layout, root), problems)
    if problems:
        more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
        raise ValueError(problems[0] + more)
    return parts


def _table(
    path: Path, columns: int, problems: Problems, *, header: Sequence[str] = (), counted: bool = False
) -> list[list[str]]:
    """The rows of a text file of columns. counted: the first line, before the header, says how many there are."""
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


def _parts(
    folder: Path, source: str, chosen: dict[str, list[tuple[str, str]]], problems: Problems, *, named: Sequence[str]
) -> Parts:
    """Image sets of the chosen (path below folder, class or "") of each part, after a look at which files there are.

    named: all images that the lists of the data set name, of other parts too; none if that is not known.
    """
    there: dict[str, set[str]] = {}  # the files of each folder
    for path in (*named, *(path for pairs in chosen.values() for path, _ in pairs)):
        inside = path.rpartition("/")[0]
        if inside not in there:
            there[inside] = set(os.listdir(folder / inside)) if (folder / inside).is_dir() else set()
    classes = tuple(sorted({name for pairs in chosen.values() for _, name in pairs if name}, key=_numeric))
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
        missing = [path for path in paths if path.rpartition("/")[2] not in there[path.rpartition("/")[0]]]
        if missing:
            of = f"{part}: {len(missing):,} of {len(paths):,} images that {source} names"
            others = f", then {', '.join(missing[1:SHOWN])}" if len(missing) > 1 else ""
            more = f" and {len(missing) - SHOWN:,} more" if len(missing) > SHOWN else ""
            problems.append(f"{of} are missing, the first {folder / missing[0]}{others}{more}")
    known = set(named)
    files = (f"{inside}/{name}" for inside, names in there.items() for name in names if not name.startswith("."))
    extra = sorted(path for path in files if path not in known and path.lower().endswith(IMAGE_SUFFIXES)) if known else []
    if extra:
        problems.notes.append(f"{len(extra):,} images that no list names are not used, the first {folder / extra[0]}")
    return parts


def _numeric(name: str) -> tuple[int, str]:
    """Sorts numbers by value and other names after them."""
    return (int(name), "") if name.isdecimal() else (2**62, name)
