"""Data sets as they lie on the disk after their official download: metric learning, landmarks and ImageNet.

    cub200    CUB_200_2011/               images.txt, images/<101.Name>/*.jpg               test: classes 101 to 200
    cars196   cars196/                    cars_annos.mat, car_ims/*.jpg                     test: classes 99 to 196
    sop       Stanford_Online_Products/   Ebay_test.txt, <category>_final/*.JPG             test: Ebay_test.txt
    inshop    Inshop_Clothes/             Eval/list_eval_partition.txt, Img/img/...         query and gallery
    folder    CLASS/IMAGE                 all of it is test
    roxford5k, rparis6k   <name>/         gnd_<name>.pkl or .json, jpg/*.jpg                database and queries
    imagenet  {train,val}/CLASS/IMAGE

The root is the folder that holds the named one, or the named one itself. The splits are those of metric learning, with other
classes in training than in test: of CUB and Cars that is not the official split, which divides the images of each class.
Images are what the lists name, in their order; other files are not used, and `check_layout` only counts them. Everything is
about the test part.

What is missing or damaged stops a reader. Counts that differ from the official ones only make `check_layout` and the
evaluators speak, so that a part of a data set can be used.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile

from dino_simpool.data.ground_truth import read_ground_truth
from dino_simpool.data.sources import IMAGE_SUFFIXES, ImageSet, class_folder, folder_or_archive

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

LAYOUTS = (*COUNTS, "folder")

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


def fine_grained(layout: str, root: str) -> tuple[ImageSet, ImageSet | None]:
    """The test images of a metric-learning data set, with labels: the queries, and the gallery or None if that is themselves.

    layout: cub200, cars196, sop, inshop or folder. Both sets number their classes alike. ValueError, in one line, if something
    is missing or damaged.
    """
    parts = _read(layout, root, _FINE_GRAINED)
    return parts["queries"], parts.get("gallery")


def landmarks(name: str, root: str) -> tuple[ImageSet, ImageSet, list[dict[str, np.ndarray]]]:
    """ROxford or RParis: the database, the queries with their boxes, and what is relevant to each query.

    name: roxford5k or rparis6k. The last is, for each query, {"easy", "hard", "junk"}: numbers of database images, int64; all
    other images are negatives. The order is that of the ground truth. ValueError, in one line, if something is missing.
    """
    parts = _read(name, root, _LANDMARKS)
    return parts["database"], parts["queries"], read_ground_truth(home(name, root), name).relevant


def check_layout(layout: str, root: str) -> Problems:
    """Everything that is missing, damaged or of another size than the official, a line each; empty if all is well.

    layout: one of LAYOUTS. No image is opened. What stops a reader comes first, differing counts last. Images that no list
    names are in the `notes`.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"there is no layout {layout}: known are {', '.join(LAYOUTS)}")
    problems = Problems()
    if layout == "imagenet":
        counts = _imagenet(Path(root), problems)
    else:
        counts = part_counts((_FINE_GRAINED | _LANDMARKS)[layout](home(layout, root), problems))
    problems += differing_counts(layout, counts) if counts else []
    return problems


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


def _cub200(folder: Path, problems: Problems) -> Parts:
    """Class number = that at the front of the folder's name, so that a part of the classes keeps its split."""
    rows = _table(folder / "images.txt", 2, problems)
    # macOS left files ._<name> beside the images; they are none.
    paths = [path for _, path in rows if not path.rpartition("/")[2].startswith("._")]
    names = [path.partition("/")[0] for path in paths]
    unnumbered = [name for name in names if not name.partition(".")[0].isdecimal()]
    if unnumbered:
        problems.append(f"{folder / 'images.txt'}: folder {unnumbered[0]} has no class number, as in 101.White_Pelican")
        return {}
    test = [(f"images/{path}", name) for path, name in zip(paths, names, strict=True) if int(name.partition(".")[0]) > 100]
    return _parts(folder, "images.txt", {"queries": test}, problems, named=[f"images/{path}" for _, path in rows])


def _cars196(folder: Path, problems: Problems) -> Parts:
    """The flag `test` of the file divides the images of each class, hence it is not looked at."""
    path = folder / "cars_annos.mat"
    if not path.is_file():
        problems.append(f"{path} is missing: get it with the data set")
        return {}
    from scipy.io import loadmat  # here, because it is slow to import and for this file only

    try:
        found = np.atleast_1d(loadmat(str(path), variable_names=["annotations"], squeeze_me=True)["annotations"])
        pairs = [(str(name), int(number)) for name, number in zip(found["relative_im_path"], found["class"], strict=True)]
    except Exception as error:  # of a damaged file it raises almost anything
        problems.append(f"{path} holds no annotations with relative_im_path and class ({type(error).__name__}: {error})")
        return {}
    test = [(name, str(number)) for name, number in pairs if number > 98]
    return _parts(folder, path.name, {"queries": test}, problems, named=[name for name, _ in pairs])


def _sop(folder: Path, problems: Problems) -> Parts:
    header = ["image_id", "class_id", "super_class_id", "path"]
    rows = _table(folder / "Ebay_test.txt", 4, problems, header=header)
    train = _table(folder / "Ebay_train.txt", 4, Problems(), header=header)  # not needed, but it lies beside the other
    named = [path for _, _, _, path in (*rows, *train)] if train else []
    return _parts(folder, "Ebay_test.txt", {"queries": [(path, n) for _, n, _, path in rows]}, problems, named=named)


def _inshop(folder: Path, problems: Problems) -> Parts:
    """The images of Img/img, which are the small ones; img_highres has the same names."""
    path = folder / "Eval" / "list_eval_partition.txt"
    rows = _table(path, 3, problems, header=["image_name", "item_id", "evaluation_status"], counted=True)
    unknown = sorted({status for _, _, status in rows} - {"train", "query", "gallery"})
    if unknown:
        problems.append(f"{path} has the evaluation_status {unknown[0]}: known are train, query and gallery")
    chosen = {
        part: [(f"Img/{name}", item) for name, item, status in rows if status == wanted]
        for part, wanted in (("queries", "query"), ("gallery", "gallery"))
    }
    return _parts(folder, "Eval/list_eval_partition.txt", chosen, problems, named=[f"Img/{name}" for name, _, _ in rows])


def _folder(folder: Path, problems: Problems) -> Parts:
    try:
        return {"queries": class_folder(str(folder))}
    except (ValueError, OSError) as error:
        problems.append(str(error))
        return {}


def _landmarks(name: str) -> Reader:
    def read(folder: Path, problems: Problems) -> Parts:
        try:
            truth = read_ground_truth(folder, name)
        except ValueError as error:
            problems.append(str(error))
            return {}
        chosen = {
            part: [(f"jpg/{image}.jpg", "") for image in names]
            for part, names in (("database", truth.database), ("queries", truth.queries))
        }
        named = [path for pairs in chosen.values() for path, _ in pairs]
        parts = _parts(folder, "the ground truth", chosen, problems, named=named)
        if "queries" in parts:
            parts["queries"] = dataclasses.replace(parts["queries"], boxes=truth.boxes)
        return {part: lenient(images) for part, images in parts.items()}

    return read


_FINE_GRAINED: dict[str, Reader] = {"cub200": _cub200, "cars196": _cars196, "sop": _sop, "inshop": _inshop, "folder": _folder}
_LANDMARKS: dict[str, Reader] = {name: _landmarks(name) for name in ("roxford5k", "rparis6k")}


class LenientImageSet(ImageSet):
    """Images of which a few may be cut short: their missing rows are grey, with a warning, as the published code reads them."""

    def read(self, index: int) -> Image.Image:
        """One image as RGB, cut to its box if there are boxes. ValueError if nothing of it can be read."""
        try:
            return super().read(index)
        except ValueError as error:
            before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True
            try:
                image = super().read(index)
            finally:
                ImageFile.LOAD_TRUNCATED_IMAGES = before
            warnings.warn(f"{error}; what there is of it is used", stacklevel=2)
            return image


def lenient(images: ImageSet) -> LenientImageSet:
    """The same images, read with tolerance."""
    return LenientImageSet(**{f.name: getattr(images, f.name) for f in dataclasses.fields(images) if f.init})


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


def _imagenet(folder: Path, problems: Problems) -> dict[str, int]:
    """Counts of train and val; their classes must be the same."""
    counts, classes = {}, {}
    for split in ("train", "val"):
        if (archive := folder_or_archive(str(folder / split))) != str(folder / split):
            try:
                images = class_folder(archive)
            except (ValueError, OSError) as error:
                problems.append(str(error))
            else:
                counts[split], classes[split] = len(images), set(images.classes)
            continue
        if not (folder / split).is_dir():
            problems.append(f"{folder / split} is missing: give a folder with train/CLASS/IMAGE and val/CLASS/IMAGE")
            continue
        entries = [entry for entry in os.scandir(folder / split) if not entry.name.startswith(".")]
        loose = [entry.name for entry in entries if not entry.is_dir() and entry.name.lower().endswith(IMAGE_SUFFIXES)]
        if loose:
            problems.append(f"{folder / split}: {len(loose):,} images lie in no class folder, the first {min(loose)}")
        sizes = {
            entry.name: sum(name.lower().endswith(IMAGE_SUFFIXES) for name in os.listdir(entry.path) if name[0] != ".")
            for entry in sorted(entries, key=lambda entry: entry.name)
            if entry.is_dir()
        }
        problems += [f"{folder / split / name}: the class folder has no images" for name, size in sizes.items() if not size]
        counts[split], classes[split] = sum(sizes.values()), set(sizes)
    if len(classes) == 2:
        for split, other in (("train", "val"), ("val", "train")):
            extra = sorted(classes[split] - classes[other])
            if extra:
                problems.append(f"{folder / split}: {len(extra)} classes are not in {other}, the first {extra[0]}")
    return counts | ({"classes": len(set().union(*classes.values()))} if classes else {})
