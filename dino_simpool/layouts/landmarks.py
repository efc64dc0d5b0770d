"""ROxford and RParis as they lie on the disk: database, queries with their boxes, and the ground truth."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile

from dino_simpool.data.sources import ImageSet
from dino_simpool.layouts.ground_truth import read_ground_truth
from dino_simpool.layouts.lists import Parts, Problems, Reader, _parts, _read, home


def landmarks(name: str, root: str) -> tuple[ImageSet, ImageSet, list[dict[str, np.ndarray]]]:
    """ROxford or RParis: the database, the queries with their boxes, and what is relevant to each query.

    name: roxford5k or rparis6k. The last is, for each query, {"easy", "hard", "junk"}: numbers of database images, int64; all
    other images are negatives. The order is that of the ground truth. ValueError, in one line, if something is missing.
    """
    parts = _read(name, root, _LANDMARKS)
    return parts["database"], parts["queries"], read_ground_truth(home(name, root), name).relevant


def _landmarks(name: str) -> Reader:
    def read(folder: Path, problems: Problems) -> Parts:
        try:
            truth = read_ground_truth(folder, name)
        except ValueError as error:
            problems.append(str(error))
            return {}
        chosen = {
            part: [(f"jpg/{image}.jpg", "") for image in names]
            for part, names in (("database", truth.database), ("queries", truth.queries))
        }
        named = [path for pairs in chosen.values() for path, _ in pairs]
        parts = _parts(folder, "the ground truth", chosen, problems, named=named)
        if "queries" in parts:
            parts["queries"] = dataclasses.replace(parts["queries"], boxes=truth.boxes)
        return {part: lenient(images) for part, images in parts.items()}

    return read


_LANDMARKS: dict[str, Reader] = {name: _landmarks(name) for name in ("roxford5k", "rparis6k")}


class LenientImageSet(ImageSet):
    """Images of which a few may be cut short: their missing rows are grey, with a warning, as the published code reads them."""

    def read(self, index: int) -> Image.Image:
        """One image as RGB, cut to its box if there are boxes. ValueError if nothing of it can be read."""
        try:
            return super().read(index)
        except ValueError as error:
            before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True
            try:
                image = super().read(index)
            finally:
                ImageFile.LOAD_TRUNCATED_IMAGES = before
            warnings.warn(f"{error}; what there is of it is used", stacklevel=2)
            return image


def lenient(images: ImageSet) -> LenientImageSet:
    """The same images, read with tolerance."""
    return LenientImageSet(**{f.name: getattr(images, f.name) for f in dataclasses.fields(images) if f.init})
