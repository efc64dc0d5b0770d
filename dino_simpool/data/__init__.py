"""Image sets (sources.py), and the loaders that feed training and evaluation (loaders.py).

A source is a folder of any depth, a tar or zip archive, or a text file of paths. `find_images`
takes one or several of them. `class_folder` takes a folder of class folders, with labels in the
order of torchvision's ImageFolder. Both use scan.py to list a source, archives.py to look into
archives, index.py to share the list between processes, and cache.py to keep it from one start to
the next. In training, broken images are replaced by others (replace.py). `train_loader` yields the
augmented views for the rest of a run. Each item depends only on the seed and its position, so a run
can be stopped anywhere and resumed exactly, with any number of workers.
"""

from __future__ import annotations

from dino_simpool.data.archives import IMAGE_SUFFIXES
from dino_simpool.data.loaders import (
    LONGEST,
    AugmentedImages,
    EvalTransform,
    default_workers,
    epoch_order,
    index_loader,
    keep_freed_memory,
    start_worker,
    train_loader,
)
from dino_simpool.data.replace import read_or_replace
from dino_simpool.data.sources import ImageSet, class_folder, evenly, find_images, folder_or_archive

__all__ = [
    "IMAGE_SUFFIXES",
    "LONGEST",
    "AugmentedImages",
    "EvalTransform",
    "ImageSet",
    "class_folder",
    "default_workers",
    "epoch_order",
    "evenly",
    "find_images",
    "folder_or_archive",
    "index_loader",
    "keep_freed_memory",
    "read_or_replace",
    "start_worker",
    "train_loader",
]
