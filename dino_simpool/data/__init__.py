"""Where images come from (sources.py), and the loaders that feed training and evaluation (loaders.py).

A source is a folder of any nesting, a tar or zip archive, a text file of paths, or several of these (`find_images`, no labels),
or a class folder (`class_folder`, labels from the folders, in the order of torchvision's ImageFolder). Behind both: scan.py
lists a source, archives.py looks into archives, index.py keeps the list in shared memory, cache.py from one start to the next.
Training puts another image in the place of a broken one (replace.py).
`train_loader` yields the augmented views of the whole rest of a run: what an item holds follows from the seed and its position
alone, so a run stopped anywhere goes on exactly, with any number of workers.
"""

from __future__ import annotations

from dino_simpool.data.archives import IMAGE_SUFFIXES
from dino_simpool.data.index import Index
from dino_simpool.data.loaders import (
    LONGEST,
    EvalTransform,
    MultiCropDataset,
    TrainBatches,
    TrainingImages,
    TransformedImages,
    default_workers,
    epoch_order,
    index_loader,
    keep_freed_memory,
    start_worker,
    steps_per_epoch,
    train_loader,
)
from dino_simpool.data.replace import read_or_replace
from dino_simpool.data.sources import ImageSet, class_folder, evenly, find_images, folder_or_archive

__all__ = [
    "IMAGE_SUFFIXES",
    "LONGEST",
    "EvalTransform",
    "ImageSet",
    "Index",
    "MultiCropDataset",
    "TrainBatches",
    "TrainingImages",
    "TransformedImages",
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
    "steps_per_epoch",
    "train_loader",
]
