"""The labeled images to learn from, and those to measure on: where they are, and how their classes
are matched.

Nothing is guessed: an error names what is there in place of a missing folder, and the option or the
command that serves. Class names are compared in Unicode's composed form (NFC), because file systems
differ in how they store an accent.
"""

from __future__ import annotations

import os
import shlex
from itertools import product
from pathlib import Path

import numpy as np

from dino_simpool.config import Exclude
from dino_simpool.data.scan import NOTHING_EXCLUDED
from dino_simpool.data.sources import ImageSet, class_folder, composed
from dino_simpool.logs import say
from dino_simpool.names import ARCHIVE_SUFFIXES, is_image
from dino_simpool.paths import find_split, option_value

LIST_SUFFIXES = (".txt", ".csv", ".tsv")
_LISTS, _CHARACTERS = 20, 16_384  # that are looked at, of each


def labeled_sets(
    train: str,
    val: str,
    *,
    inside: str = "",
    options: tuple[str, str] = ("--train", "--val"),
    exclude: Exclude = NOTHING_EXCLUDED,
    subset_per_class: int | None = None,
) -> tuple[ImageSet, ImageSet]:
    """Two class folders: to learn from (perhaps the first images of each class), and to measure on.

    train, val: paths, below the folder `inside` if that is given. options: that set them.
    FileNotFoundError for one that is missing, ValueError if it has no class folders or if val has a
    class that train lacks; both say what to give instead.
    """
    learn = _class_folder(train, inside, options[0], "train", exclude, subset_per_class=subset_per_class)
    measure = _class_folder(val, inside, options[1], "val", exclude, known=learn)
    if same_source(learn.root, measure.root):
        say(f"warning: {options[0]} and {options[1]} are the same images, {learn.root}: each will find itself")
    return learn, measure


def class_numbers(images: ImageSet, train: ImageSet) -> np.ndarray:
    """The classes (M,) int64 of labeled images, numbered as in `train`. ValueError if `train` lacks
    one."""
    assert images.labels is not None
    number = {composed(name): i for i, name in enumerate(train.classes)}
    if missing := [name for name in images.classes if composed(name) not in number]:
        raise ValueError(
            f"class {missing[0]} of {images.root} is not among the {len(number)} classes of {train.root} "
            f"({len(missing)} such): use the same class folders in both"
        )
    return np.array([number[composed(name)] for name in images.classes], dtype=np.int64)[images.labels]


def same_source(one: str, other: str) -> bool:
    """Whether two sources are the same folder or archive, through links too, or one is the other
    packed (train.tar beside train/)."""
    stems = set()
    for path in map(os.path.realpath, (one, other)):
        stem, suffix = os.path.splitext(path)
        stems.add(stem if suffix.lower() in ARCHIVE_SUFFIXES else path)
    return len(stems) == 1 or os.path.samefile(one, other)


def _class_folder(
    name: str,
    inside: str,
    option: str,
    role: str,
    exclude: Exclude,
    *,
    known: ImageSet | None = None,
    subset_per_class: int | None = None,
) -> ImageSet:
    """A class folder, all classes of which `known` has too."""
    root = find_split(name, inside=inside, option=option, role=role)
    try:
        images = class_folder(root, exclude, subset_per_class=subset_per_class)
        if known is not None:
            class_numbers(images, known)
    except ValueError as error:
        places = [Path(place) for place in (os.path.dirname(root) or ".", root) if os.path.isdir(place)]
        paths = [path for place in places for path in place.iterdir()]
        lists = [path for path in paths if path.suffix.lower() in LIST_SUFFIXES and path.is_file()]
        lists.sort(key=lambda path: (os.path.basename(root) not in path.stem, path))  # val.txt before train.txt
        for path in lists[:_LISTS]:
            if advice := _conversion(path, Path(root), known, option, inside):
                raise ValueError(f"the images of {root} are in no class folders, but {advice}") from error
        raise
    return images


def _conversion(path: Path, root: Path, known: ImageSet | None, option: str, inside: str) -> str:
    """How to sort the images of `root` into class folders by a list of them and their classes; ""
    if the file at `path` is something else."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_CHARACTERS)
    except (OSError, UnicodeDecodeError):
        return ""
    whole = text if len(text) < _CHARACTERS else text[: text.rfind("\n") + 1]
    lines = [line for line in whole.split("\n") if line.strip()]
    holder = root / "images" if (root / "images").is_dir() else root
    separator = next((mark for mark in ("\t", ",") if lines and mark in lines[-1]), None)
    rows = [line.split(separator) if separator else line.strip().split(None, 1) for line in lines]
    if not rows or min(map(len, rows)) < 2:
        return ""
    for column, base in product((0, 1), (root.parent, holder)):
        header = int(not is_image(rows[0][column]))
        images = [base / row[column] for row in rows[header:]]
        if images and all(image.parent == holder and os.path.isfile(image) for image in images):
            break
    else:
        return ""
    names = None if known is None else set(map(composed, known.classes))
    for row in rows[header:]:
        label = row[1 - column]
        if not label or "/" in label or (names is not None and composed(label) not in names):
            return f"{path} has labels such as {label!r}, which is no class of train: put each image into a folder of its class"
    target = root.with_name(f"{root.name}_classes")
    fields = ("image label" if column == 0 else "label image") + (" rest" if separator else "")
    mark = {None: "", ",": "IFS=, ", "\t": "IFS=$(printf '\\t') "}[separator]
    into, source, listed = (shlex.quote(os.path.abspath(place)) for place in (target, base, path))
    loop = f'mkdir -p {into}/"$label" && ln -s {source}/"$image" {into}/"$label"/'
    lines_of_images = f'tr -d "\\r" < {listed} | sed "/^[[:space:]]*$/d" | tail -n +{1 + header}'
    command = f'{lines_of_images} | while {mark}read -r {fields} || [ -n "$image" ]; do {loop}; done'
    return f"{path} says the class of each. Run `{command}`, then give {option} {option_value(target, inside)}"
