"""Where images come from (sources.py), their decoding (decode.py), and the loaders of training and evaluation (loaders.py).

A source is a folder of any nesting, several folders, or a text file of paths (`find_images`, no labels), or a class folder
(`class_folder`, labels from the folders, in the order of torchvision's ImageFolder). `read_rgb` makes 8-bit RGB of any image
or raises BrokenImage; in training another image takes the place of a broken one (replace.py).
`train_loader` yields the augmented views of the whole rest of a run: what an item holds follows from the seed and its position
alone, so a run stopped anywhere goes on exactly, with any number of workers.
"""

from __future__ import annotations

from dino_simpool.data.decode import BrokenImage, Examined, examine, read_rgb
from dino_simpool.data.loaders import (
    EvalTransform,
    MultiCropDataset,
    TrainBatches,
    TrainingImages,
    TransformedImages,
    default_workers,
    epoch_order,
    index_loader,
    start_worker,
    steps_per_epoch,
    train_loader,
)
from dino_simpool.data.replace import read_or_replace
from dino_simpool.data.sources import IMAGE_SUFFIXES, ImageSet, class_folder, find_images

__all__ = [
    "IMAGE_SUFFIXES",
    "BrokenImage",
    "EvalTransform",
    "Examined",
    "ImageSet",
    "MultiCropDataset",
    "TrainBatches",
    "TrainingImages",
    "TransformedImages",
    "class_folder",
    "default_workers",
    "epoch_order",
    "examine",
    "find_images",
    "index_loader",
    "read_or_replace",
    "read_rgb",
    "start_worker",
    "steps_per_epoch",
    "train_loader",
]
