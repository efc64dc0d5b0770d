"""Attention on the object: the share of attention inside its mask over the mask's share of the
area. Uniform attention gets 1, and attention that is all inside gets 1 / area, the maximum.

The attention of a cell counts as spread evenly over the part of the image that the cell sees: the
shares are exact for any mask and grid, and neither is resampled. What the center crop cuts away
counts neither as object nor as area.

A data set with masks has, beside {train,val}/<class>/<name>.*, a file
masks/{train,val}/<class>/<name>.png of the same size as the image: 0 outside the object, any other
value inside.

H, W: pixels of the image.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dino_simpool import distributed
from dino_simpool.config import MasksConfig, to_dict
from dino_simpool.data import EvalTransform, ImageSet, class_folder, evenly, find_split
from dino_simpool.data.decode import open_image
from dino_simpool.eval import run
from dino_simpool.features.encode import Forward, decoding_of, preprocessing
from dino_simpool.features.maps import attention_maps, cell_coverage, seen_box, shares
from dino_simpool.models.encoder import Encoder


def main(cfg: MasksConfig) -> None:
    """The command `dino-simpool masks`."""
    run("masks", evaluate, cfg)


def evaluate(encoder: Encoder, cfg: MasksConfig) -> dict[str, object]:
    """attention_in_mask and mask_area in %, means over images, and `ratio`, the one by the other.

    Images whose object is completely cropped away are left out and counted. ValueError if a mask is
    missing or does not fit, or if no image is left.
    """
    if not cfg.data:
        raise ValueError("no data is given: give --data DIR, a folder with val/ and masks/val/")
    settings = preprocessing(encoder.config, image_size=cfg.image_size, resize=cfg.resize)
    images = class_folder(find_split(cfg.val, inside=cfg.data), cfg.excluded)
    # Masks are of the pixels as they are stored.
    images = images.with_decoding(replace(decoding_of(cfg, encoder, images), exif_orientation=False))
    chosen = evenly(len(images), cfg.max_images)
    positions = np.arange(distributed.rank(), len(chosen), distributed.world_size())
    rows = []
    forward = Forward(EvalTransform(**settings), cfg.batch_size, cfg.workers, cfg.precision)
    for maps, _, indices in attention_maps(encoder, images, chosen[positions], forward):
        for index, cells in zip(indices.tolist(), maps.double().numpy(), strict=True):
            mask = read_mask(mask_path(cfg.data, cfg.val, images.name(index)), images, index)
            box = seen_box(encoder, mask.shape, resize=settings["resize"], crop=settings["image_size"])
            rows.append(shares(cells, cell_coverage(mask, box, grid=cells.shape)))
    own = torch.tensor(rows, dtype=torch.float64).reshape(-1, 2)
    measured = distributed.gather_by_index(own, torch.from_numpy(positions), len(chosen))
    measured = measured[measured[:, 1] > 0]
    if not len(measured):
        raise ValueError(
            f"no mask of {images.root} has a pixel left after the center crop: check the masks, or give a smaller --resize"
        )
    inside, area = measured.mean(0).tolist()
    counts = {"images": len(measured), "without object": len(chosen) - len(measured)}
    shares_in_percent = {"attention_in_mask": 100 * inside, "mask_area": 100 * area, "ratio": inside / area}
    return shares_in_percent | {
        "split": cfg.val,
        "decoding": to_dict(images.decoding),
        "preprocessing": settings,
        "counts": counts,
    }


def mask_path(data: str | Path, split: str, image: str | Path) -> Path:
    """Where the mask of an image is stored; the path of the image is relative to data/split."""
    return Path(data) / "masks" / split / Path(image).with_suffix(".png")


def read_mask(path: Path, images: ImageSet, index: int) -> np.ndarray:
    """The mask (H, W) of an image as bool. ValueError if it is missing or has another size."""
    image = images.path(index)
    if not path.is_file():
        raise ValueError(f"{image} has no mask {path}: give a data set with masks/<split>/<class>/<name>.png for each image")
    with open_image(path) as mask, open_image(images.read_bytes(index)) as original:
        if mask.size != original.size:
            raise ValueError(
                f"mask {path} has {mask.width} x {mask.height} pixels, its image {original.width} x {original.height}: "
                "they must be equal"
            )
        return np.asarray(mask.convert("L")) > 0
