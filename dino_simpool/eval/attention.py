"""Where the encoder looks, on any images: maps, pictures, masks and boxes.

Source: the figures of "Keep It SimPool" (ICCV 2023) and visualize_attention.py of facebookresearch/dino: images of 896 x 896
pixels, maps from their lowest to their highest value, and masks of the fewest cells that hold 60 % of the attention. Ours:
other sizes, boxes, entropy, and sums in float64, since float32 moves the border of large masks.

In <out>/attention/, for each image NUMBER_NAME (the number is its place in the data; of single heads with _head0 ... after it):

    .npy  the map (h, w) float32, sum 1      _heat.png  the map      _overlay.png  over the image      _mask.png  the mask
    .json  sizes, entropy, and the boxes around the connected parts of the mask in pixels of the image

<out>/attention.png shows them together, <out>/attention.json holds every setting and what is in the files of each image.
Pictures have the size of what the encoder saw; with fit native that is the image itself.

h, w: cells of a map, N = h * w; H, W: pixels of an image.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dino_simpool import distributed
from dino_simpool.config import AttentionConfig
from dino_simpool.data import IMAGE_SUFFIXES, LONGEST, ImageSet, find_images, index_loader
from dino_simpool.data.augment import to_tensor
from dino_simpool.eval import decoded, run
from dino_simpool.eval.masks import Box, evenly, seen_size
from dino_simpool.features.encode import evaluation_mode
from dino_simpool.logs import progress
from dino_simpool.models.encoder import Encoder, thin_images
from dino_simpool.pictures import fit_in, heat, mask_overlay, overlay, save_png, sheet, tile, unnormalize
from dino_simpool.results import result_name, results_folder

ROUNDING = 1e-12
"""Masses that differ by less are equal: a cell on the border of the mask must not depend on the order of a sum."""
TILE = 160
"""Side of a picture on the contact sheet in pixels."""
COLUMNS = 9
"""Pictures in a row of the contact sheet, if those of one image are not more already."""


def main(cfg: AttentionConfig) -> None:
    """The command `dino-simpool attention`."""
    run("attention", evaluate, cfg)


@dataclass(frozen=True)
class FitTransform:
    """A whole image to the size that `AttentionConfig.fit` asks for (bicubic, Pillow), normalised.

    A side that is shorter than a cell of the encoder is enlarged to one. With fit shorter, a longer side ends at LONGEST times
    image_size, instead of at any number of gigabytes.
    """

    fit: Literal["square", "shorter", "longer", "native"]
    image_size: int
    """Length in pixels; not used by native."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    least: int = 1
    """Pixels of a cell."""

    def __call__(self, image: Image.Image) -> tuple[Tensor, Tensor]:
        """(3, H', W') float32 of an RGB image, and its own (H, W) as int64."""
        size = image.size
        if self.fit == "square":
            size = (self.image_size, self.image_size)
        elif self.fit != "native":
            side = max(min(size), max(size) / LONGEST) if self.fit == "shorter" else max(size)
            size = (round(size[0] * self.image_size / side), round(size[1] * self.image_size / side))
        size = (max(self.least, size[0]), max(self.least, size[1]))
        resized = image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)
        return to_tensor([resized], mean=self.mean, std=self.std)[0], torch.tensor([image.height, image.width])


def evaluate(encoder: Encoder, cfg: AttentionConfig) -> dict[str, Any]:
    """Write the files of all images; return the means of entropy and mask_area in %, and what is in the files.

    entropy: of a map over ln N, 100 % if it is uniform.   mask_area: cells in the mask over N.   encoder: on the device where
    it shall run.   ValueError names an image whose attention is not finite.
    """
    images = decoded(find_any_images(cfg), cfg)
    chosen = evenly(len(images), cfg.max_images)
    positions = np.arange(distributed.rank(), len(chosen), distributed.world_size())
    size = cfg.image_size or 4 * encoder.config.image_size
    least = next(side for side in itertools.count(1) if seen_size(encoder, side))
    transform = FitTransform(cfg.fit, size, encoder.config.mean, encoder.config.std, least)
    folder = results_folder(cfg.out, cfg.checkpoint) / result_name("attention", cfg)
    folder.mkdir(parents=True, exist_ok=True)
    on_sheet = chosen[evenly(len(chosen), cfg.sheet_images)]
    device = next(encoder.parameters()).device
    batch_size = cfg.batch_size if cfg.fit == "square" else 1
    loader = index_loader(images, transform, chosen[positions], batch_size=batch_size, workers=cfg.workers, device=device)
    records: dict[int, dict[str, Any]] = {}
    rows: dict[int, list[np.ndarray]] = {}
    with progress(len(chosen), 0, "attention") as bar:
        for (pixels, sizes), indices in loader:
            maps = _maps(encoder, pixels.to(device), cfg, names=[images.name(index) for index in indices.tolist()])
            shown = unnormalize(pixels, transform.mean, transform.std)
            for picture, own, original, index in zip(shown, maps, sizes.tolist(), indices.tolist(), strict=True):
                stem = f"{index:0{len(str(len(images) - 1))}d}_{_file_name(images.name(index))}"
                seen = seen_size(encoder, picture.shape[1]), seen_size(encoder, picture.shape[2])
                record, tiles = write_image(folder / stem, picture, own, original=original, seen=seen, cfg=cfg)
                records[index] = {"name": images.name(index), "files": stem, **record}
                if index in on_sheet:
                    rows[index] = tiles
            bar.update(min(distributed.world_size() * len(indices), len(chosen) - bar.n))
    everyone = [each for part in distributed.gather_objects(records) for each in part.items()]
    all_rows = [each for part in distributed.gather_objects(rows) for each in part.items()]
    if distributed.is_main():
        save_png(f"{folder}.png", contact_sheet([tiles for _, tiles in sorted(all_rows)]))
    return _result(encoder, transform, [record for _, record in sorted(everyone)], cfg)


def _maps(encoder: Encoder, pixels: Tensor, cfg: AttentionConfig, *, names: list[str]) -> np.ndarray:
    """Maps (B, heads, h, w) float32 of images (B, 3, H, W); names: what errors call them."""
    try:
        with evaluation_mode(encoder), thin_images(encoder), torch.inference_mode():
            with torch.autocast(pixels.device.type, torch.bfloat16, enabled=cfg.precision == "bf16"):
                maps = encoder.attention(pixels, per_head=cfg.heads == "each")
    except ValueError as error:
        raise ValueError(f"{names[0]}: {error}") from error
    for name, own in zip(names, maps, strict=True):
        if not own.isfinite().all():
            raise ValueError(f"the attention of {name} is not finite: check the weights and that image, and use precision fp32")
    return (maps if maps.ndim == 4 else maps[:, None]).float().cpu().numpy()


def _result(encoder: Encoder, transform: FitTransform, records: list[dict[str, Any]], cfg: AttentionConfig) -> dict[str, Any]:
    maps = [each for record in records for each in record["maps"]]
    pool = encoder.config.pool
    source = {"simpool": "SimPool", "cls": "class token, last block", "gap": "global average pooling: uniform by definition"}
    size = {} if cfg.fit == "native" else {"image_size": transform.image_size}
    return {
        "entropy": float(np.mean([each["entropy"] for each in maps])),
        "mask_area": float(np.mean([each["mask_area"] for each in maps])),
        "counts": {"images": len(records), "maps": len(maps)},
        "attention": {
            "of": source[pool], "heads": cfg.heads, "mask": f"the fewest cells with {cfg.mass:g} of the mass",
            "parts": "cells that share a side", "boxes": "left, top, right, bottom in pixels of the image, largest part first",
        },
        "preprocessing": {"fit": cfg.fit, **size, "mean": list(transform.mean), "std": list(transform.std)},
        "images": records,
    }  # fmt: skip


def find_any_images(cfg: AttentionConfig) -> ImageSet:
    """The images of cfg.data (of its folder cfg.val, if given), which may be a single file too. ValueError without any."""
    if not cfg.data:
        raise ValueError("no data is given: say --data IMAGE, or a folder of images")
    path = os.path.join(cfg.data, cfg.val) if cfg.val else cfg.data
    if os.path.isfile(path) and path.lower().endswith(IMAGE_SUFFIXES):
        return ImageSet(os.path.dirname(path), np.array([os.path.basename(path)]))
    return find_images(path, subset_per_class=cfg.subset_per_class)


def write_image(
    path: Path, picture: Tensor, maps: np.ndarray, *, original: list[int], seen: tuple[int, int], cfg: AttentionConfig
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Write all files of one image; returns what its .json holds, and its tiles (3, S, S) uint8 for the contact sheet.

    path: of the files, without their endings.   picture: (3, H', W') in 0..1, as the encoder saw it.   maps: (heads, h, w).
    original: H, W of the image.   seen: the pixels of the picture, down and across, that the cells cover.
    """
    height, width = original
    box = (0.0, 0.0, seen[1] * width / picture.shape[2], seen[0] * height / picture.shape[1])
    small = fit_in(picture, TILE)
    small_seen = (
        max(1, round(seen[0] * small.shape[1] / picture.shape[1])), max(1, round(seen[1] * small.shape[2] / picture.shape[2]))
    )  # fmt: skip
    said, tiles = [], [small]
    for head, attention in enumerate(maps):
        file = f"{path}_head{head}" if cfg.heads == "each" else str(path)
        mask = mass_mask(attention, cfg.mass)
        cells, kept = torch.from_numpy(attention), torch.from_numpy(mask)
        np.save(f"{file}.npy", attention)
        save_png(f"{file}_heat.png", heat(cells, seen, smooth=cfg.smooth))
        save_png(f"{file}_overlay.png", overlay(picture, cells, seen=seen, smooth=cfg.smooth))
        save_png(f"{file}_mask.png", mask_overlay(picture, kept, seen=seen))
        said.append({
            "entropy": entropy(attention), "mask_area": 100 * float(mask.mean()), "boxes": part_boxes(attention, mask, box),
        })  # fmt: skip
        tiles += [overlay(small, cells, seen=small_seen, smooth=cfg.smooth), mask_overlay(small, kept, seen=small_seen)]
    record = {
        "image": {"height": height, "width": width}, "input": list(picture.shape[1:]), "seen": list(seen),
        "grid": list(maps.shape[1:]), "maps": said,
    }  # fmt: skip
    Path(f"{path}.json").write_text(json.dumps(record, indent=2) + "\n")
    return record, [(tile(each, TILE) * 255).round().byte().numpy() for each in tiles]


def mass_mask(attention: np.ndarray, mass: float = 0.6) -> np.ndarray:
    """The fewest cells, the largest first, that hold a share `mass` of the attention: (h, w) bool.

    attention: (h, w), not negative, of any sum.   With the shares v in ascending order and their cumulative sum c, a cell stays
    if c > 1 - mass, as published. Of equal cells those that come first in the map go first (stable sort).
    """
    shares = attention.astype(np.float64).ravel() / attention.sum(dtype=np.float64)
    order = np.argsort(shares, kind="stable")
    mask = np.zeros(shares.size, bool)
    mask[order[np.cumsum(shares[order]) > 1 - mass + ROUNDING]] = True
    return mask.reshape(attention.shape)


def entropy(attention: np.ndarray) -> float:
    """Entropy of a map (h, w) over ln N in %: 100 if it is uniform, 0 if all of it is in one cell."""
    shares = attention[attention > 0].astype(np.float64) / attention.sum(dtype=np.float64)
    return 100 * float(-(shares * np.log(shares)).sum()) / math.log(attention.size) if attention.size > 1 else 100.0


def connected_parts(mask: np.ndarray) -> list[np.ndarray]:
    """The connected parts of a mask (h, w), each as its cells (n, 2) row and column, largest first, then first from the top.

    Cells that share a side are connected; those that only meet at a corner are not.
    """
    left = {(int(row), int(column)) for row, column in np.argwhere(mask)}
    parts = []
    for first in sorted(left):
        if first not in left:
            continue
        left.remove(first)
        part = [first]
        for row, column in part:  # it grows while it is read
            for cell in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
                if cell in left:
                    left.remove(cell)
                    part.append(cell)
        parts.append(np.array(part))
    return sorted(parts, key=len, reverse=True)


def part_boxes(attention: np.ndarray, mask: np.ndarray, box: Box) -> list[dict[str, Any]]:
    """The box around each connected part of a mask, largest part first: box, cells, and its share of the attention in %.

    attention, mask: (h, w).   box: what the h x w equal cells cover, in pixels of the image; so are the boxes (not rounded).
    """
    left, top, right, bottom = box
    height, width = mask.shape
    total = attention.sum(dtype=np.float64)
    found = []
    for part in connected_parts(mask):
        (first_row, first_column), (last_row, last_column) = part.min(0).tolist(), part.max(0).tolist()
        across = [left + (right - left) * column / width for column in (first_column, last_column + 1)]
        down = [top + (bottom - top) * row / height for row in (first_row, last_row + 1)]
        share = attention[part[:, 0], part[:, 1]].sum(dtype=np.float64) / total
        found.append({"box": [across[0], down[0], across[1], down[1]], "cells": len(part), "mass": 100 * float(share)})
    return found


def contact_sheet(tiles: Iterable[list[np.ndarray]]) -> Tensor:
    """Images with their overlays and masks, several images in a row: (3, H, W).   tiles: of each image, (3, S, S) uint8."""
    images = [[torch.from_numpy(each) / 255 for each in row] for row in tiles]
    heads = (len(images[0]) - 1) // 2
    of_head = [f" of head {head}" if heads > 1 else "" for head in range(heads)]
    captions = ["image", *(f"{what}{head}" for head in of_head for what in ("attention", "mask"))]
    together = min(len(images), max(1, COLUMNS // len(captions)))
    blank = [torch.ones_like(images[0][0])] * len(captions)
    images += [blank] * (-len(images) % together)
    rows = [list(itertools.chain(*images[start : start + together])) for start in range(0, len(images), together)]
    return sheet(rows, captions * together)


def _file_name(name: str) -> str:
    """The last part of an image's name without its suffix, fit for any file system."""
    return re.sub(r"[^\w.-]", "_", os.path.splitext(os.path.basename(name))[0])[:80]
