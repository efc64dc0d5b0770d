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

from pathlib import Path

from dino_simpool.layouts.classes import _imagenet
from dino_simpool.layouts.landmarks import _LANDMARKS, landmarks
from dino_simpool.layouts.lists import COUNTS, Problems, differing_counts, home, part_counts
from dino_simpool.layouts.metric_learning import _FINE_GRAINED, fine_grained

__all__ = [
    "COUNTS",
    "LAYOUTS",
    "Problems",
    "check_layout",
    "differing_counts",
    "fine_grained",
    "home",
    "landmarks",
    "part_counts",
]

LAYOUTS = (*COUNTS, "folder")


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
