"""Labeled features that `extract` wrote, in place of images: what k-NN, linear and recall share.

With a folder of images (--data), they say which features are used and their classes, and must be
the images of the features. Without one, the ids of the features say both.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dino_simpool.config import ClassificationConfig, FeaturesConfig
from dino_simpool.data import ImageSet, class_numbers, labeled_sets, same_source
from dino_simpool.features.stored import StoredFeatures
from dino_simpool.models.encoder import Encoder

Labeled = tuple[ImageSet, Tensor]
"""Images with labels, whose files may be gone, and their features (n, D), which may be mapped."""


def stored_class_folders(cfg: ClassificationConfig, encoder: Encoder | None) -> tuple[Labeled, Labeled, dict[str, Any]]:
    """The features to learn from, those to measure on, and what the result says of them.

    They are in one folder, of images below train/ and val/, or in two, FEATURES/train and
    FEATURES/val. ValueError if they are of other images than those in cfg.data, or not of the
    encoder (None: of any one).
    """
    whole = (Path(cfg.stored) / "meta.json").exists()
    folders = [cfg.stored] if whole else [str(Path(cfg.stored, part)) for part in (cfg.train, cfg.val)]
    if not whole and not any((Path(folder) / "meta.json").exists() for folder in folders):
        raise ValueError(
            f"{cfg.stored} holds no features, nor do {' and '.join(folders)}: give a folder that `extract` wrote, or one that "
            f"holds such folders {cfg.train} and {cfg.val}"
        )
    opened = [StoredFeatures.open(folder) for folder in folders]
    both = opened * 2 if whole else opened
    sets = [each.labeled(part if whole else "") for each, part in zip(both, (cfg.train, cfg.val), strict=True)]
    class_numbers(sets[1], sets[0])  # ValueError for a class that train lacks
    same = sets[0].root == sets[1].root
    if cfg.data:
        first = cfg.subset_per_class
        images = labeled_sets(cfg.train, cfg.val, inside=cfg.data, exclude=cfg.excluded, subset_per_class=first)
        for stored, given, chosen in zip(sets, images, (cfg.exclude or first, cfg.exclude), strict=True):
            if not chosen and len(stored) > len(given):
                raise ValueError(
                    f"{stored.root} has features of {len(stored):,} images and {given.root} has {len(given):,}: extract again, "
                    "or give the data that they are of"
                )
        sets, same = list(images), same_source(images[0].root, images[1].root)
    about = description(opened, encoder, cfg) | {
        "overlap": {"same_folder": same, "equal_files": None, "val": len(sets[1])}  # no file is read
    }
    train, val = ((images, each.of(images, files=bool(cfg.data))) for images, each in zip(sets, both, strict=True))
    return train, val, about


def description(opened: Sequence[StoredFeatures], encoder: Encoder | None, cfg: FeaturesConfig) -> dict[str, Any]:
    """What a result says of the features that it is of: where they come from, how the images were
    decoded and prepared, and the model. ValueError if they were not made in one way, or not by the
    encoder, if there is one."""
    first = opened[0]
    for other in opened:
        first.require_same_way(other)
    if encoder is not None:
        first.require_encoder(encoder, cfg.checkpoint)
    settings = first.meta["settings"]
    return {
        "dataset": cfg.data or cfg.stored,
        "dtype": settings["precision"],
        "decoding": first.decoding,
        "preprocessing": settings["preprocessing"],
        "features": [each.record() for each in opened],
    } | ({"model": first.model()} if encoder is None else {})
