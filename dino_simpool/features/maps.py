"""Attention maps of images, and measures on them: masks, parts, boxes, share on an object.

Source of the masks: visualize_attention.py of facebookresearch/dino. Ours: sums in float64, since
float32 moves the border of large masks.

B images; h, w: cells of a map, N = h * w; H, W: pixels of an image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from scipy import ndimage
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from dino_simpool.data import ImageSet
from dino_simpool.features.encode import Forward, device_of, encode
from dino_simpool.models.encoder import Encoder

Box = tuple[float, float, float, float]
"""left, top, right, bottom in pixels"""
ROUNDING = 1e-12
"""Masses that differ by less are equal: the order of a sum must not decide about a border cell."""


def attention_maps(
    encoder: Encoder, images: ImageSet, indices: Sequence[int] | np.ndarray, forward: Forward, *, per_head: bool = False
) -> Iterator[tuple[Tensor, Any, Tensor]]:
    """Attention maps of the images `indices` in this order, by batch.

    Each item: maps (B, h, w) float32 on the CPU, each with the sum 1 (per_head: (B, heads, h, w));
    what the transform made of the images, on the CPU; and (B,) int64 image numbers. The transform
    may return a tuple that starts with the image. ValueError as in `attention_of`; BrokenImage
    names an image that cannot be read.
    """
    for batch, numbers in forward.batches(images, indices, device_of(encoder)):
        pixels = batch if isinstance(batch, Tensor) else batch[0]
        names = [images.name(index) for index in numbers.tolist()]
        yield attention_of(encoder, pixels, names=names, precision=forward.precision, per_head=per_head), batch, numbers


def attention_of(
    encoder: Encoder, pixels: Tensor, *, names: Sequence[str], precision: str = "fp32", per_head: bool = False
) -> Tensor:
    """Attention maps of one batch of normalized images (B, 3, H, W), as in `attention_maps`.

    ValueError names an image whose attention is not finite, or the first one if the encoder cannot
    take images of this size or has no attention.
    """
    try:
        maps = encode(encoder, pixels, precision=precision, method=partial(encoder.attention, per_head=per_head)).cpu()
    except ValueError as error:
        raise ValueError(f"{names[0]}: {error}") from error
    for name, own in zip(names, maps, strict=True):
        if not own.isfinite().all():
            raise ValueError(f"the attention of {name} is not finite: check the weights and that image, and use precision fp32")
    return maps


def mass_mask(attention: np.ndarray, mass: float = 0.6) -> np.ndarray:
    """The fewest cells, the largest first, that hold a share `mass` of the attention: (h, w) bool.

    attention: (h, w), not negative, of any sum. With the shares v in ascending order and their
    cumulative sum c, a cell stays if c > 1 - mass, as published. Of equal cells, those that come
    first in the map are left out first (stable sort).
    """
    values = attention.astype(np.float64).ravel() / attention.sum(dtype=np.float64)
    order = np.argsort(values, kind="stable")
    mask = np.zeros(values.size, bool)
    mask[order[np.cumsum(values[order]) > 1 - mass + ROUNDING]] = True
    return mask.reshape(attention.shape)


def entropy(attention: np.ndarray) -> float:
    """Entropy of a map (h, w) over ln N in %: 100 if uniform, 0 if all attention is in one cell."""
    values = attention[attention > 0].astype(np.float64) / attention.sum(dtype=np.float64)
    return 100 * float(-(values * np.log(values)).sum()) / math.log(attention.size) if attention.size > 1 else 100.0


def connected_parts(mask: np.ndarray) -> list[np.ndarray]:
    """The connected parts of a mask (h, w), each as its cells (n, 2) row and column: largest first,
    then first from the top. Cells that share a side are connected."""
    labels, _ = ndimage.label(mask)  # numbered in the order of their first cells
    parts = [
        np.argwhere(labels[rows, columns] == number) + (rows.start, columns.start)
        for number, (rows, columns) in enumerate(ndimage.find_objects(labels), 1)
    ]
    return sorted(parts, key=len, reverse=True)


def part_boxes(attention: np.ndarray, mask: np.ndarray, box: Box) -> list[dict[str, Any]]:
    """Of each connected part of a mask, largest first: its box, cells, and share of attention in %.

    attention, mask: (h, w). box: what the h x w equal cells cover, in pixels of the image; so are
    the boxes (not rounded).
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


def seen_size(encoder: Encoder, size: int) -> int:
    """How many of the `size` pixels of one side of an input its map covers, from the first on.

    A ViT drops what is left beyond its last whole patch, and so does a ConvNeXt, which shrinks its
    maps without padding. A ResNet pads and sees everything.
    """
    trunk = encoder.trunk
    if encoder.config.is_vit:
        return size // encoder.config.patch_size * encoder.config.patch_size
    if not isinstance(trunk, ConvNeXt):
        return size
    cells, stride = size, 1
    for layer in trunk.stem:
        if isinstance(layer, nn.Conv2d):
            assert not isinstance(layer.padding, str)
            cells = (cells + 2 * layer.padding[0] - layer.kernel_size[0]) // layer.stride[0] + 1
            stride *= layer.stride[0]
    halvings = len(trunk.stages) - 1
    return min(size, (cells >> halvings) * (stride << halvings))


def seen_box(encoder: Encoder, shape: tuple[int, int], *, resize: int, crop: int) -> Box:
    """What the encoder sees of an image after EvalTransform(crop, resize=resize), in its pixels.

    shape: (H, W) of the image. What `seen_size` leaves out is at the right and at the bottom.
    """
    seen = seen_size(encoder, crop)
    ends = []
    for side in (shape[1], shape[0]):
        resized = resize * side // min(shape)
        start = round((resized - crop) / 2)
        ends.append((start * side / resized, (start + seen) * side / resized))
    (left, right), (top, bottom) = ends
    return left, top, right, bottom


def cell_coverage(mask: np.ndarray, box: Box, *, grid: tuple[int, int]) -> np.ndarray:
    """The share of each of `grid` = (h, w) equal cells of `box` that the mask covers: (h, w).

    mask: (H, W) bool. box: in pixels of the mask; outside the mask nothing is covered.
    """
    left, top, right, bottom = box
    rows = _overlap(grid[0], top, bottom, mask.shape[0])
    columns = _overlap(grid[1], left, right, mask.shape[1])
    return rows @ mask.astype(np.float64) @ columns.T


def shares(attention: np.ndarray, coverage: np.ndarray) -> tuple[float, float]:
    """The share of the attention (h, w) inside the mask and the mask's share of the area, both in
    0..1. coverage: from `cell_coverage`."""
    return float((attention * coverage).sum() / attention.sum()), float(coverage.mean())


def _overlap(cells: int, low: float, high: float, pixels: int) -> np.ndarray:
    """The share of each of the equal cells between low and high in each pixel: (cells, pixels)."""
    edges = np.linspace(low, high, cells + 1)
    pixel = np.arange(pixels)
    length = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    return length.clip(min=0) / ((high - low) / cells)
