"""Small pictures of tensors: what the encoder saw, and where it looked. Images are (3, H, W) float in 0..1.

Attention is drawn as published for DINO: each map from its lowest to its highest value in viridis, its cells as squares, over
the image at half opacity. viridis is by S. van der Walt and N. Smith (public domain, CC0); ten of its colours are kept here,
with straight lines between them.

h, w: cells of the attention; seen: pixels (down, across), from the top left, that the cells cover; the rest is left as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Size = tuple[int, int]
"""down, across"""

VIRIDIS = [
    (68, 1, 84), (72, 40, 120), (62, 73, 137), (49, 104, 142), (38, 130, 142),
    (31, 158, 137), (53, 183, 121), (110, 206, 88), (181, 222, 43), (253, 231, 37),
]  # fmt: skip
MASK = (255, 64, 32)
"""Colour of a mask; its outline is lighter."""
OUTLINE = (255, 236, 200)
CAPTION = 20
"""Height of a line of text in pixels."""


def unnormalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Undo the normalisation of (3, H, W) or (B, 3, H, W): floats in 0..1, on the CPU."""
    shape = (3, 1, 1)
    return (images.detach().float().cpu() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)).clamp(0, 1)


def enlarge(cells: Tensor, size: Size, *, smooth: bool) -> Tensor:
    """Cells (h, w) as pixels `size`: each a rectangle, or smooth: bicubic between their centres, within their range."""
    if not smooth:
        return F.interpolate(cells[None, None], size, mode="nearest-exact")[0, 0]
    pixels = F.interpolate(cells[None, None], size, mode="bicubic", align_corners=False)[0, 0]
    return pixels.clamp(cells.min(), cells.max())


def paint(strength: Tensor, ramp: Sequence[Sequence[float]]) -> Tensor:
    """Values (H, W) in 0..1 as colours (C, H, W) in 0..1.   ramp: two or more colours of C channels in 0..255, evenly apart."""
    colours = torch.tensor(ramp, dtype=torch.float64) / 255
    place = strength.double().clamp(0, 1) * (len(ramp) - 1)
    low = place.long().clamp(max=len(ramp) - 2)
    return torch.lerp(colours[low], colours[low + 1], (place - low)[..., None]).permute(2, 0, 1).float()


def heat(attention: Tensor, size: Size, *, smooth: bool = False) -> Tensor:
    """Attention (h, w) as a picture (3, *size): its lowest value dark blue, its highest yellow; dark blue if all are equal."""
    attention = attention.double()
    spread = attention.max() - attention.min()
    relative = (attention - attention.min()) / spread if spread > 0 else torch.zeros_like(attention)
    return paint(enlarge(relative, size, smooth=smooth), VIRIDIS)


def overlay(image: Tensor, attention: Tensor, *, seen: Size | None = None, smooth: bool = False) -> Tensor:
    """An image (3, H, W) under the picture of its attention (h, w), half of each."""
    down, across = seen or (image.shape[1], image.shape[2])
    picture = image.clone()
    picture[:, :down, :across] = 0.5 * image[:, :down, :across] + 0.5 * heat(attention, (down, across), smooth=smooth)
    return picture


def mask_overlay(image: Tensor, mask: Tensor, *, seen: Size | None = None) -> Tensor:
    """An image (3, H, W) with a mask (h, w) of cells in half opaque colour, and its outline inside of its border."""
    down, across = seen or (image.shape[1], image.shape[2])
    inside = torch.zeros(image.shape[1:])
    inside[:down, :across] = enlarge(mask.float(), (down, across), smooth=False)
    width = 1 + max(image.shape[1:]) // 300
    # What lies outside of the picture counts as outside of the mask.
    outside = F.pad(1 - inside, (width,) * 4, value=1.0)[None, None]
    for side in ((2 * width + 1, 1), (1, 2 * width + 1)):  # one after another: the square would take its whole area a pixel
        outside = F.max_pool2d(outside, side, stride=1)
    border = inside.bool() & outside[0, 0].bool()
    colour, line = (torch.tensor(each)[:, None, None] / 255 for each in (MASK, OUTLINE))
    return torch.where(border, line, torch.where(inside.bool(), 0.5 * image + 0.5 * colour, image))


def strip(images: Sequence[Tensor]) -> Tensor:
    """Images side by side on white, smaller ones at the top: (3, greatest height, sum of widths + gaps)."""
    height = max(image.shape[1] for image in images)
    padded = [F.pad(image, (0, 2, 0, height - image.shape[1]), value=1.0) for image in images]
    return torch.cat(padded, dim=2)


def fit_in(image: Tensor, side: int) -> Tensor:
    """An image (3, H, W) made smaller or larger, so that its longer side has `side` pixels."""
    scale = side / max(image.shape[1:])
    size = [max(1, round(length * scale)) for length in image.shape[1:]]
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]


def tile(image: Tensor, side: int) -> Tensor:
    """An image (3, H, W), H and W up to `side`, in the middle of a white square (3, side, side)."""
    top, left = (side - image.shape[1]) // 2, (side - image.shape[2]) // 2
    return F.pad(image, (left, side - image.shape[2] - left, top, side - image.shape[1] - top), value=1.0)


def sheet(rows: Sequence[Sequence[Tensor]], captions: Sequence[str]) -> Tensor:
    """Rows of equal tiles (3, S, S) with one line of captions, one for each column, above them: (3, H, W)."""
    assert all(len(row) == len(captions) for row in rows)
    body = torch.cat([F.pad(strip(row), (0, 0, 0, 2), value=1.0) for row in rows], dim=1)
    column = body.shape[2] // len(captions)
    head = Image.new("RGB", (body.shape[2], CAPTION), "white")
    draw = ImageDraw.Draw(head)
    for number, caption in enumerate(captions):
        draw.text((column * (number + 0.5) - 1, CAPTION / 2), caption, "black", ImageFont.load_default(12), anchor="mm")
    return torch.cat([torch.from_numpy(np.array(head)).permute(2, 0, 1) / 255, body], dim=1)


def to_bytes(image: Tensor) -> np.ndarray:
    """A picture (C, H, W) in 0..1 as (H, W, C) uint8."""
    return (image * 255).round().byte().permute(1, 2, 0).contiguous().numpy()


def save_png(path: str | Path, image: Tensor) -> None:
    """Write a picture (3, H, W) in 0..1 as an 8-bit PNG."""
    Image.fromarray(to_bytes(image)).save(path, "PNG")
