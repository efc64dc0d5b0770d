"""Where the encoder looks, on any images: maps, pictures, masks and boxes.

Source: the figures of "Keep It SimPool" (ICCV 2023) and visualize_attention.py of
facebookresearch/dino: images of 896 x 896 pixels, maps from their lowest to their highest value,
and masks of the fewest cells that hold 60 % of the attention. Ours: other sizes, boxes and entropy.

Files in <out>/attention/ for each image, NUMBER_NAME (the number is its place in the data; for
single heads followed by _head0, _head1, ...):

    .npy          the map (h, w) float32, sum 1
    _heat.png     the map
    _overlay.png  the map over the image
    _mask.png     the mask
    .json         sizes, entropy, and boxes around the parts of the mask, in pixels of the image

<out>/attention.png shows them together. <out>/attention.json holds every setting and what is in the
files of each image. Pictures have the size of what the encoder saw; with fit native that is the
image itself.

h, w: cells of a map, N = h * w; H, W: pixels of an image.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dino_simpool import distributed
from dino_simpool.config import AttentionConfig
from dino_simpool.data import IMAGE_SUFFIXES, LONGEST, ImageSet, evenly, find_images
from dino_simpool.data.augment import to_tensor
from dino_simpool.eval import decoded, run
from dino_simpool.features.maps import attention_maps, entropy, mass_mask, part_boxes, seen_size
from dino_simpool.logs import progress
from dino_simpool.models.encoder import Encoder
from dino_simpool.pictures import Tile, contact_sheet, fitted, heat, mask_overlay, overlay, save_png, to_bytes, unnormalize
from dino_simpool.results import result_name, results_folder

TILE = 160
"""Side of a picture on the contact sheet in pixels."""
COLUMNS = 9
"""Most pictures in a row of the contact sheet, unless one image alone has more."""


def main(cfg: AttentionConfig) -> None:
    """The command `dino-simpool attention`."""
    run("attention", evaluate, cfg)


@dataclass(frozen=True)
class FitTransform:
    """Resizes a whole image as `AttentionConfig.fit` says (bicubic, Pillow) and normalizes it.

    A side shorter than a cell of the encoder is enlarged to one cell. With fit shorter, the longer
    side is limited to LONGEST times image_size, since it could take gigabytes otherwise.
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
    """Write the files of all images; return means of entropy and mask_area in %, and the records.

    entropy: of a map over ln N, 100 % if it is uniform.   mask_area: cells in the mask over N.
    encoder: on the device to run on.   ValueError names an image whose attention is not finite.
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
    batches = attention_maps(
        encoder,
        images,
        chosen[positions],
        transform=transform,
        batch_size=cfg.batch_size if cfg.fit == "square" else 1,
        workers=cfg.workers,
        precision=cfg.precision,
        per_head=cfg.heads == "each",
    )
    written: dict[int, tuple[dict[str, Any], list[Tile]]] = {}
    with progress(len(chosen), 0, "attention") as bar:
        for maps, (pixels, sizes), indices in batches:
            shown = unnormalize(pixels, transform.mean, transform.std)
            for picture, own, original, index in zip(shown, maps, sizes.tolist(), indices.tolist(), strict=True):
                name = images.name(index)
                path = folder / f"{index:0{len(str(len(images) - 1))}d}_{_file_name(name)}"
                seen = seen_size(encoder, picture.shape[1]), seen_size(encoder, picture.shape[2])
                heads = own.reshape(-1, *own.shape[-2:]).numpy()
                record, tiles = write_image(path, picture, heads, name=name, size=original, seen=seen, cfg=cfg)
                written[index] = {"name": name, "files": path.name, **record}, tiles if index in on_sheet else []
            bar.update(min(distributed.world_size() * len(indices), len(chosen) - bar.n))
    everyone = {index: each for part in distributed.gather_objects(written) for index, each in part.items()}
    records, sheet = zip(*(everyone[index] for index in sorted(everyone)), strict=True)
    if distributed.is_main():
        save_sheet(Path(f"{folder}.png"), [tiles for tiles in sheet if tiles])
    return _result(encoder, transform, list(records), cfg)


def _result(encoder: Encoder, transform: FitTransform, records: list[dict[str, Any]], cfg: AttentionConfig) -> dict[str, Any]:
    maps = [each for record in records for each in record["maps"]]
    source = {"simpool": "SimPool", "cls": "class token, last block", "gap": "global average pooling: uniform by definition"}
    size = {} if cfg.fit == "native" else {"image_size": transform.image_size}
    return {
        "entropy": float(np.mean([each["entropy"] for each in maps])),
        "mask_area": float(np.mean([each["mask_area"] for each in maps])),
        "split": cfg.val,
        "counts": {"images": len(records), "maps": len(maps)},
        "attention": {
            "of": source.get(encoder.config.pool, encoder.config.pool),
            "heads": cfg.heads,
            "mask": f"the fewest cells with {cfg.mass:g} of the mass",
            "parts": "cells that share a side",
            "boxes": "left, top, right, bottom in pixels of the image, largest part first",
        },
        "preprocessing": {"fit": cfg.fit, **size, "mean": list(transform.mean), "std": list(transform.std)},
        "images": records,
    }


def find_any_images(cfg: AttentionConfig) -> ImageSet:
    """The images of cfg.data/cfg.val, which may be a single file. ValueError if data is not given."""
    if not cfg.data:
        raise ValueError("no data is given: say --data IMAGE, or a folder of images")
    path = os.path.join(cfg.data, cfg.val) if cfg.val else cfg.data
    if os.path.isfile(path) and path.lower().endswith(IMAGE_SUFFIXES):
        return ImageSet(os.path.dirname(path), np.array([os.path.basename(path)]))
    return find_images(path, subset_per_class=cfg.subset_per_class)


def write_image(
    path: Path, picture: Tensor, maps: np.ndarray, *, name: str, size: list[int], seen: tuple[int, int], cfg: AttentionConfig
) -> tuple[dict[str, Any], list[Tile]]:
    """Write all files of one image; return the contents of its .json and its contact sheet tiles.

    path: of the files, without their endings.   picture: (3, H', W') in 0..1, as the encoder saw
    it.   maps: (heads, h, w).   name, size: name and H, W of the image.   seen: the pixels of
    the picture, down and across, that the cells cover.
    """
    height, width = size
    box = (0.0, 0.0, seen[1] * width / picture.shape[2], seen[0] * height / picture.shape[1])
    said, tiles = [], [_tile(picture, name)]
    for head, attention in enumerate(maps):
        file = f"{path}_head{head}" if cfg.heads == "each" else str(path)
        of_head = f" of head {head}" if len(maps) > 1 else ""
        mask = mass_mask(attention, cfg.mass)
        cells, kept = torch.from_numpy(attention), torch.from_numpy(mask)
        over, masked = overlay(picture, cells, seen=seen, smooth=cfg.smooth), mask_overlay(picture, kept, seen=seen)
        np.save(f"{file}.npy", attention)
        save_png(f"{file}_heat.png", heat(cells, seen, smooth=cfg.smooth))
        save_png(f"{file}_overlay.png", over)
        save_png(f"{file}_mask.png", masked)
        said.append(
            {"entropy": entropy(attention), "mask_area": 100 * float(mask.mean()), "boxes": part_boxes(attention, mask, box)}
        )
        tiles += [_tile(over, f"attention{of_head}"), _tile(masked, f"mask{of_head}")]
    record = {
        "image": {"height": height, "width": width},
        "input": list(picture.shape[1:]),
        "seen": list(seen),
        "grid": list(maps.shape[1:]),
        "maps": said,
    }
    Path(f"{path}.json").write_text(json.dumps(record, indent=2) + "\n")
    return record, tiles


def _tile(picture: Tensor, caption: str) -> Tile:
    return Tile(fitted(Image.fromarray(to_bytes(picture)), TILE), (caption,))


def save_sheet(path: Path, images: list[list[Tile]]) -> None:
    """Write the contact sheet: each image with its overlays and masks, several images in a row."""
    own = len(images[0])
    together = max(1, COLUMNS // own)
    rows = [list(itertools.chain(*images[start : start + together])) for start in range(0, len(images), together)]
    contact_sheet(rows, size=TILE, lines=range(own, together * own, own)).save(path)


def _file_name(name: str) -> str:
    """The last part of an image's name without its suffix, safe for any file system."""
    return re.sub(r"[^\w.-]", "_", os.path.splitext(os.path.basename(name))[0])[:80]
