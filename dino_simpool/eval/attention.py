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

<out>/attention.png shows them together. <out>/attention.json holds every setting and the .json of
each image. Pictures have the size of what the encoder saw.

h, w: cells of a map, N = h * w; H, W: pixels of an image.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dino_simpool import distributed
from dino_simpool.config import AttentionConfig, to_dict
from dino_simpool.data import LONGEST, ImageSet, evenly, find_images, find_split
from dino_simpool.data.augment import to_tensor
from dino_simpool.eval import run
from dino_simpool.features.encode import Forward, decoding_of
from dino_simpool.features.maps import attention_maps, entropy, mass_mask, part_boxes, seen_size
from dino_simpool.features.rows import npy_bytes
from dino_simpool.files import Fields, read_json, write_atomically, write_json
from dino_simpool.logs import progress
from dino_simpool.models.encoder import Encoder
from dino_simpool.models.weights import weights_sha256
from dino_simpool.pictures import Tile, contact_sheet, fitted, heat, mask_overlay, overlay, png_bytes, to_bytes, unnormalize
from dino_simpool.results import result_name, results_folder

TILE = 160
"""Side of a picture on the contact sheet in pixels."""
COLUMNS = 9
"""Most pictures in a row of the contact sheet, unless one image alone has more."""


def main(cfg: AttentionConfig) -> None:
    """The command `dino-simpool attention`."""
    run("attention", evaluate, cfg)


def resized(
    image: Image.Image, *, fit: str, image_size: int, mean: Sequence[float], std: Sequence[float], least: int = 1
) -> tuple[Tensor, Tensor]:
    """A whole RGB image, resized as `AttentionConfig.fit` says (bicubic, Pillow) and normalized,
    (3, H', W') float32, and its own (H, W) as int64.

    A side below `least`, the pixels of a cell, is enlarged to that. With fit shorter, the longer
    side is limited to LONGEST times image_size, since it could take gigabytes otherwise.
    """
    size = image.size
    if fit == "square":
        size = (image_size, image_size)
    elif fit != "native":
        side = max(min(size), max(size) / LONGEST) if fit == "shorter" else max(size)
        size = (round(size[0] * image_size / side), round(size[1] * image_size / side))
    size = (max(least, size[0]), max(least, size[1]))
    changed = image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)
    return to_tensor([changed], mean=mean, std=std)[0], torch.tensor([image.height, image.width])


def evaluate(encoder: Encoder, cfg: AttentionConfig) -> dict[str, Any]:
    """Write the files of all images; return means of entropy and mask_area in %, and the records.

    entropy: of a map over ln N, 100 % if it is uniform. mask_area: cells in the mask over N.
    ValueError names an image whose attention is not finite.
    """
    images = find_any_images(cfg)
    images = images.with_decoding(decoding_of(cfg, encoder, images))
    chosen = evenly(len(images), cfg.max_images)
    size = cfg.image_size or 4 * encoder.config.image_size
    mean, std = encoder.config.mean, encoder.config.std
    least = next(side for side in itertools.count(1) if seen_size(encoder, side))
    folder = results_folder(cfg.out, cfg.checkpoint) / result_name("attention", cfg)
    if distributed.is_main():
        _take(folder, {"config": to_dict(cfg), "weights": weights_sha256(encoder), "images": images.digest()})
    distributed.barrier()
    on_sheet = chosen[evenly(len(chosen), cfg.sheet_images)]
    transform = partial(resized, fit=cfg.fit, image_size=size, mean=mean, std=std, least=least)
    forward = Forward(transform, cfg.batch_size if cfg.fit == "square" else 1, cfg.workers, cfg.precision)
    mine = chosen[distributed.rank() :: distributed.world_size()]
    written: dict[int, tuple[dict[str, Any], list[Tile]]] = {}
    with progress(len(chosen), 0, "attention") as bar:
        for maps, (pixels, sizes), indices in attention_maps(encoder, images, mine, forward, per_head=cfg.heads == "each"):
            shown = unnormalize(pixels, mean, std)
            for picture, own, original, index in zip(shown, maps, sizes.tolist(), indices.tolist(), strict=True):
                name = images.name(index)
                stem = re.sub(r"[^\w.-]", "_", os.path.splitext(os.path.basename(name))[0])  # safe for any file system
                stem = stem.encode()[:160].decode(errors="ignore")  # names have at most 255 bytes
                path = folder / f"{index:0{len(str(len(images) - 1))}d}_{stem}"
                seen = seen_size(encoder, picture.shape[1]), seen_size(encoder, picture.shape[2])
                heads = own.reshape(-1, *own.shape[-2:]).numpy()
                record, tiles = write_image(path, picture, heads, name=name, size=original, seen=seen, cfg=cfg)
                written[index] = {"name": name, "files": path.name, **record}, tiles if index in on_sheet else []
            bar.update(min(distributed.world_size() * len(indices), len(chosen) - bar.n))
    everyone = {index: each for part in distributed.gather_objects(written) for index, each in part.items()}
    records, sheet = zip(*(everyone[index] for index in sorted(everyone)), strict=True)
    if distributed.is_main():
        rows = [tiles for tiles in sheet if tiles]
        columns = len(rows[0])  # of one image
        together = max(1, COLUMNS // columns)
        rows = [list(itertools.chain(*rows[i : i + together])) for i in range(0, len(rows), together)]
        picture = contact_sheet(rows, size=TILE, lines=range(columns, together * columns, columns))
        write_atomically(Path(f"{folder}.png"), lambda file: picture.save(file, "PNG"))
    return _result(encoder, cfg, list(records), size)


def _take(folder: Path, made_by: dict[str, Any]) -> None:
    """Make the folder for pictures. ValueError if it holds those of another run, which would stay
    among the new ones; a run with the same options, weights and images writes the same files."""
    unimportant = ("device", "workers", "batch_size", "checkpoint")
    made_by = made_by | {"config": {name: value for name, value in made_by["config"].items() if name not in unimportant}}
    settings = folder / "made_by.json"
    if folder.is_dir() and any(folder.iterdir()):
        fields: Fields = {"config": dict, "weights": str, "images": str}
        remedy = f"remove {folder}, or give another --out"
        before = read_json(settings, fields, what="of a run of attention", remedy=remedy) if settings.is_file() else None
        if before != made_by:
            raise ValueError(f"{folder} holds pictures of another run (other options, weights or images): {remedy}")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(settings, made_by)


def _result(encoder: Encoder, cfg: AttentionConfig, records: list[dict[str, Any]], image_size: int) -> dict[str, Any]:
    maps = [each for record in records for each in record["maps"]]
    source = {"simpool": "SimPool", "cls": "class token, last block", "gap": "global average pooling: uniform by definition"}
    model, size = encoder.config, {} if cfg.fit == "native" else {"image_size": image_size}
    return {
        "entropy": float(np.mean([each["entropy"] for each in maps])),
        "mask_area": float(np.mean([each["mask_area"] for each in maps])),
        "split": cfg.val,
        "counts": {"images": len(records), "maps": len(maps)},
        "attention": {
            "of": source.get(model.pool, model.pool),
            "heads": cfg.heads,
            "mask": f"the fewest cells with {cfg.mass:g} of the mass",
            "parts": "cells that share a side",
            "boxes": "left, top, right, bottom in pixels of the image, largest part first",
        },
        "preprocessing": {"fit": cfg.fit, **size, "mean": list(model.mean), "std": list(model.std)},
        "images": records,
    }


def find_any_images(cfg: AttentionConfig) -> ImageSet:
    """The images of cfg.data/cfg.val, which may be a single file."""
    if not cfg.data:
        raise ValueError("no data is given: give --data IMAGE, or a folder of images")
    path = find_split(cfg.val, inside=cfg.data) if cfg.val else cfg.data
    return find_images(path, cfg.excluded, subset_per_class=cfg.subset_per_class)


def write_image(
    path: Path, picture: Tensor, maps: np.ndarray, *, name: str, size: list[int], seen: tuple[int, int], cfg: AttentionConfig
) -> tuple[dict[str, Any], list[Tile]]:
    """Write all files of one image; return the contents of its .json and its contact sheet tiles.

    path: of the files, without their endings. picture: (3, H', W') in 0..1, as the encoder saw it.
    maps: (heads, h, w). name, size: name and H, W of the image. seen: the pixels of the picture,
    down and across, that the cells cover.
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
        _write(f"{file}.npy", npy_bytes(attention))
        for ending, drawn in (("heat", heat(cells, seen, smooth=cfg.smooth)), ("overlay", over), ("mask", masked)):
            _write(f"{file}_{ending}.png", png_bytes(drawn))
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
    _write(f"{path}.json", json.dumps(record, indent=2).encode() + b"\n")
    return record, tiles


def _write(path: str, content: bytes) -> None:
    """One file of an image, whole or not at all; there may be many thousands."""
    write_atomically(Path(path), lambda file: file.write_bytes(content), flush=False)


def _tile(picture: Tensor, caption: str) -> Tile:
    return Tile(fitted(Image.fromarray(to_bytes(picture)), TILE), (caption,))
