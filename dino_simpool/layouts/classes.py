"""Data sets of class folders: ImageNet, or any folder of the form CLASS/IMAGE."""

from __future__ import annotations

import os
from pathlib import Path

from dino_simpool.data.sources import IMAGE_SUFFIXES, class_folder, folder_or_archive
from dino_simpool.layouts.lists import Parts, Problems


def _folder(folder: Path, problems: Problems) -> Parts:
    try:
        return {"queries": class_folder(str(folder))}
    except (ValueError, OSError) as error:
        problems.append(str(error))
        return {}


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
