"""Data sets of metric learning as they lie on the disk: CUB-200-2011, Cars-196, SOP, In-Shop."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dino_simpool.data.sources import ImageSet
from dino_simpool.layouts.classes import _folder
from dino_simpool.layouts.lists import Parts, Problems, Reader, _parts, _read, _table


def fine_grained(layout: str, root: str) -> tuple[ImageSet, ImageSet | None]:
    """The test images of a metric-learning data set, with labels: the queries, and the gallery or None if that is themselves.

    layout: cub200, cars196, sop, inshop or folder. Both sets number their classes alike. ValueError, in one line, if something
    is missing or damaged.
    """
    parts = _read(layout, root, _FINE_GRAINED)
    return parts["queries"], parts.get("gallery")


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


_FINE_GRAINED: dict[str, Reader] = {"cub200": _cub200, "cars196": _cars196, "sop": _sop, "inshop": _inshop, "folder": _folder}
