"""ROxford and RParis: database, queries with their boxes, and ground truth."""

from __future__ import annotations

import dataclasses
import warnings
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile

from dino_simpool.data import ImageSet
from dino_simpool.data.decode import EncodedImage
from dino_simpool.layouts.ground_truth import read_ground_truth
from dino_simpool.layouts.layout import Layout, Parts, Problems, listed_images, load


def landmarks(name: str, root: str) -> tuple[ImageSet, ImageSet, list[dict[str, np.ndarray]]]:
    """ROxford or RParis: database, queries with boxes, and the images relevant to each query.

    name: roxford5k or rparis6k. The last is, for each query, {"easy", "hard", "junk"}: numbers of
    database images, int64; all other images are negatives. The order is that of the ground truth.
    ValueError, in one line, if something is missing.
    """
    parts = load(name, root, LANDMARKS)
    return parts["database"], parts["queries"], read_ground_truth(LANDMARKS[name].home(root), name).relevant


def _read(folder: Path, problems: Problems, *, name: str) -> Parts:
    truth = read_ground_truth(folder, name)
    images = {"database": truth.database, "queries": truth.queries}
    chosen = {part: [(f"jpg/{image}.jpg", "") for image in names] for part, names in images.items()}
    named = [path for pairs in chosen.values() for path, _ in pairs]
    parts = listed_images(folder, "the ground truth", chosen, problems, named=named)
    if "queries" in parts:
        parts["queries"] = dataclasses.replace(parts["queries"], boxes=truth.boxes)
    return {part: lenient(each) for part, each in parts.items()}


LANDMARKS = {
    name: Layout(name, partial(_read, name=name), folder=name, content="jpg", counts={"database": database, "queries": 70})
    for name, database in (("roxford5k", 4_993), ("rparis6k", 6_322))
}
"""ROxford and RParis, by name."""


class LenientImageSet(ImageSet):
    """Images that may be truncated. Missing rows become gray, with a warning, as published."""

    def decoded(self, index: int, file: EncodedImage) -> Image.Image:
        """Like ImageSet.decoded, with a ValueError only if no part of the image can be read."""
        try:
            return super().decoded(index, file)
        except ValueError as error:
            before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True
            try:
                image = super().decoded(index, file)
            finally:
                ImageFile.LOAD_TRUNCATED_IMAGES = before
            warnings.warn(f"{error}; the readable part is used", stacklevel=2)
            return image


def lenient(images: ImageSet) -> LenientImageSet:
    """The same images, accepting truncated files."""
    return LenientImageSet(**{f.name: getattr(images, f.name) for f in dataclasses.fields(images) if f.init})
