"""Data sets for classification: ImageNet."""

from __future__ import annotations

import os
from pathlib import Path

from dino_simpool.data import composed, find_images, folder_or_archive, same_names
from dino_simpool.layouts.layout import Layout, Parts, Problems


def _read_imagenet(folder: Path, problems: Problems) -> Parts:
    """Train and val, without labels. Both must have the same class folders and no other images."""
    parts, folders = {}, {}
    for split in ("train", "val"):
        root = folder_or_archive(str(folder / split))
        if not os.path.exists(root):
            problems.append(f"{root} is missing: give a folder with train/CLASS/IMAGE and val/CLASS/IMAGE")
            continue
        try:
            images = parts[split] = find_images(root)
        except (ValueError, OSError) as error:
            problems.append(str(error))
            continue
        counts = images.index.images_per_group()
        if loose := counts.pop("", 0):
            problems.append(f"{root}: {loose:,} images are not in a class folder, the first {images.name(0)}")
        problems += [f"{root}/{name}: the class folder has no images" for name, count in counts.items() if not count]
        if twins := same_names(counts):
            problems.append(f"{root}: {twins}")
        folders[split] = set(map(composed, counts))
    if len(folders) == 2:
        for split, other in (("train", "val"), ("val", "train")):
            if extra := sorted(folders[split] - folders[other]):
                problems.append(f"{folder / split}: {len(extra)} classes are not in {other}, the first {extra[0]}")
    return parts


IMAGENET = Layout("imagenet", _read_imagenet, counts={"train": 1_281_167, "val": 50_000, "classes": 1_000})
