"""Data sets for metric learning: CUB-200-2011, Cars-196, SOP, In-Shop, class folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dino_simpool.data import ImageSet, class_folder
from dino_simpool.layouts.layout import Layout, Parts, Problems, listed_images, load, read_table


def fine_grained(layout: str, root: str) -> tuple[ImageSet, ImageSet | None]:
    """The test images of a metric-learning data set, with labels: (queries, gallery).

    layout: a name in FINE_GRAINED. The gallery is None if the queries are their own gallery. Both
    sets have the same class numbers. ValueError, in one line, if something is missing or broken.
    """
    parts = load(layout, root, FINE_GRAINED)
    return parts["queries"], parts.get("gallery")


def _cub200(folder: Path, problems: Problems) -> Parts:
    """The class number starts the folder's name, so a part of the classes keeps its split."""
    rows = read_table(folder / "images.txt", 2, problems)
    # Files ._<name> beside the images, left by macOS, are not images.
    paths = [path for _, path in rows if not path.rpartition("/")[2].startswith("._")]
    names = [path.partition("/")[0] for path in paths]
    unnumbered = [name for name in names if not name.partition(".")[0].isdecimal()]
    if unnumbered:
        raise ValueError(f"{folder / 'images.txt'}: folder {unnumbered[0]} has no class number, as in 101.White_Pelican")
    test = [(f"images/{path}", name) for path, name in zip(paths, names, strict=True) if int(name.partition(".")[0]) > 100]
    return listed_images(folder, "images.txt", {"queries": test}, problems, named=[f"images/{path}" for _, path in rows])


def _cars196(folder: Path, problems: Problems) -> Parts:
    """The flag `test` in the file divides the images of each class, so it is not used."""
    path = folder / "cars_annos.mat"
    if not path.is_file():
        raise ValueError(f"{path} is missing: get it with the data set")
    from scipy.io import loadmat  # imported here, because it is slow and only needed for this file

    try:
        found = np.atleast_1d(loadmat(str(path), variable_names=["annotations"], squeeze_me=True)["annotations"])
        pairs = [(str(name), int(number)) for name, number in zip(found["relative_im_path"], found["class"], strict=True)]
    except Exception as error:  # a broken file raises almost anything
        said = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} holds no annotations with relative_im_path and class ({said}): get it again") from error
    test = [(name, str(number)) for name, number in pairs if number > 98]
    return listed_images(folder, path.name, {"queries": test}, problems, named=[name for name, _ in pairs])


def _sop(folder: Path, problems: Problems) -> Parts:
    header = ["image_id", "class_id", "super_class_id", "path"]
    rows = read_table(folder / "Ebay_test.txt", 4, problems, header=header)
    train = read_table(folder / "Ebay_train.txt", 4, Problems(), header=header)  # not needed, but next to the other
    named = [path for _, _, _, path in (*rows, *train)] if train else []
    return listed_images(folder, "Ebay_test.txt", {"queries": [(path, n) for _, n, _, path in rows]}, problems, named=named)


def _inshop(folder: Path, problems: Problems) -> Parts:
    """The images in Img/img, which are the small ones; img_highres has the same names."""
    path = folder / "Eval" / "list_eval_partition.txt"
    rows = read_table(path, 3, problems, header=["image_name", "item_id", "evaluation_status"], counted=True)
    unknown = sorted({status for _, _, status in rows} - {"train", "query", "gallery"})
    if unknown:
        problems.append(f"{path} has the evaluation_status {unknown[0]}: known are train, query and gallery")
    chosen = {
        part: [(f"Img/{name}", item) for name, item, status in rows if status == wanted]
        for part, wanted in (("queries", "query"), ("gallery", "gallery"))
    }
    return listed_images(folder, "Eval/list_eval_partition.txt", chosen, problems, named=[f"Img/{name}" for name, _, _ in rows])


FINE_GRAINED = {
    layout.name: layout
    for layout in (
        Layout("cub200", _cub200, "CUB_200_2011", "images.txt", {"queries": 5_924, "classes": 100}),
        Layout("cars196", _cars196, "cars196", "cars_annos.mat", {"queries": 8_131, "classes": 98}),
        Layout("sop", _sop, "Stanford_Online_Products", "Ebay_test.txt", {"queries": 60_502, "classes": 11_316}),
        Layout("inshop", _inshop, "Inshop_Clothes", "Eval", {"queries": 14_218, "gallery": 12_612, "classes": 3_985}),
        Layout("folder", lambda folder, problems: {"queries": class_folder(str(folder))}),
    )
}
"""The layouts with labels for metric learning, by name."""
