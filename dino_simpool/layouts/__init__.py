"""Public data sets as downloaded: metric learning, landmarks, ImageNet.

    cub200    CUB_200_2011/              images.txt, images/<101.Name>/*.jpg
    cars196   cars196/                   cars_annos.mat, car_ims/*.jpg
    sop       Stanford_Online_Products/  Ebay_test.txt, <category>_final/*.JPG
    inshop    Inshop_Clothes/            Eval/list_eval_partition.txt, Img/img/...
    folder                               CLASS/IMAGE
    roxford5k, rparis6k   <name>/        gnd_<name>.pkl or .json, jpg/*.jpg
    imagenet                             {train,val}/CLASS/IMAGE

The root is the folder that contains the named one, or the named one itself. The test part is
classes 101 to 200 of CUB, 99 to 196 of Cars, Ebay_test.txt of SOP, and all images of a folder;
In-Shop has queries and a gallery, and the landmarks have queries and a database. These are the
splits of metric learning, where training and test have different classes. For CUB and Cars this is
not the official split, which divides the images of each class. The images are those that the lists
name, in that order; other files are only counted, by `check_layout`. Of metric learning only the
test part is read.

Missing or broken files stop a reader. Counts that differ from the official ones are only reported,
by `check_layout` and the evaluators, so a part of a data set can be used.
"""

from __future__ import annotations

from dino_simpool.layouts.classes import IMAGENET
from dino_simpool.layouts.landmarks import LANDMARKS
from dino_simpool.layouts.layout import Layout, Problems, part_counts
from dino_simpool.layouts.metric_learning import FINE_GRAINED

__all__ = ["LAYOUTS", "check_layout", "differing_counts", "part_counts"]

LAYOUTS: dict[str, Layout] = FINE_GRAINED | LANDMARKS | {IMAGENET.name: IMAGENET}


def check_layout(layout: str, root: str) -> Problems:
    """Everything that is missing, broken or not of the official size, one line each.

    layout: one of LAYOUTS. No image is opened. Problems that stop a reader come first, differing
    counts last. Images that no list names are in the `notes`.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"there is no layout {layout}: known are {', '.join(LAYOUTS)}")
    parts, problems = LAYOUTS[layout].parts(root)
    problems += differing_counts(layout, part_counts(parts))
    return problems


def differing_counts(layout: str, counts: dict[str, int]) -> list[str]:
    """One line for each count (from `part_counts`) that differs from the official one."""
    return [
        f"{layout}: {name}: {counts[name]:,} found, {number:,} expected"
        for name, number in LAYOUTS[layout].counts.items()
        if name in counts and counts[name] != number
    ]
