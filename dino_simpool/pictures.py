"""Pictures of what the encoder saw and where it looked, as tensors in 0..1, and contact sheets.

Attention is drawn as published for DINO: each map from its lowest to its highest value in viridis,
its cells as squares, over the image at half opacity. viridis is by S. van der Walt and N. Smith
(public domain, CC0); ten of its colors are kept here, with straight lines between them.

h, w: cells of the attention; seen: pixels (down, across), from the top left, that the cells cover;
the rest stays as it is.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

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
MASK, OUTLINE = (255, 64, 32), (255, 236, 200)
"""Colors of a mask and of its outline."""
INK, GRAY = (20, 20, 20), (110, 110, 110)
"""Colors of the first line of a caption and of the others."""
GAP = 12
"""Pixels between the tiles of a contact sheet and around all of them."""


def unnormalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Undo the normalization of (3, H, W) or (B, 3, H, W): floats in 0..1, on the CPU."""
    scale, shift = (torch.tensor(values)[:, None, None] for values in (std, mean))
    return (images.detach().float().cpu() * scale + shift).clamp(0, 1)


def enlarge(cells: Tensor, size: Size, *, smooth: bool) -> Tensor:
    """Cells (h, w) as pixels `size`: rectangles, or bicubic between centers, in their range."""
    pixels = F.interpolate(cells[None, None], size, mode="bicubic" if smooth else "nearest-exact")[0, 0]
    return pixels.clamp(cells.min(), cells.max())


def paint(strength: Tensor, ramp: Sequence[Sequence[float]]) -> Tensor:
    """Values (H, W) in 0..1 as colors (C, H, W) in 0..1; ramp: evenly spaced colors (0..255)."""
    colors = torch.tensor(ramp, dtype=torch.float64) / 255
    place = strength.double().clamp(0, 1) * (len(ramp) - 1)
    low = place.long().clamp(max=len(ramp) - 2)
    return torch.lerp(colors[low], colors[low + 1], (place - low)[..., None]).permute(2, 0, 1).float()


def heat(attention: Tensor, size: Size, *, smooth: bool = False) -> Tensor:
    """Attention (h, w) as a picture (3, *size), from dark blue (lowest, or all equal) to yellow."""
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
    """An image (3, H, W) with a mask (h, w) in half-opaque color, and its outline inside."""
    down, across = seen or (image.shape[1], image.shape[2])
    inside = torch.zeros(image.shape[1:])
    inside[:down, :across] = enlarge(mask.float(), (down, across), smooth=False)
    width = 1 + max(image.shape[1:]) // 300
    # What lies outside the picture counts as outside the mask.
    outside = F.pad(1 - inside, (width,) * 4, value=1.0)[None, None]
    for side in ((2 * width + 1, 1), (1, 2 * width + 1)):  # a square window would be slower
        outside = F.max_pool2d(outside, side, stride=1)
    border = inside.bool() & outside[0, 0].bool()
    color, line = (torch.tensor(each)[:, None, None] / 255 for each in (MASK, OUTLINE))
    return torch.where(border, line, torch.where(inside.bool(), 0.5 * image + 0.5 * color, image))


def strip(images: Sequence[Tensor]) -> Tensor:
    """Images side by side on white, smaller ones at the top: (3, height, sum of widths + gaps)."""
    height = max(image.shape[1] for image in images)
    padded = [F.pad(image, (0, 2, 0, height - image.shape[1]), value=1.0) for image in images]
    return torch.cat(padded, dim=2)


def to_bytes(image: Tensor) -> np.ndarray:
    """A picture (C, H, W) in 0..1 as (H, W, C) uint8."""
    return (image * 255).round().byte().permute(1, 2, 0).contiguous().numpy()


def png_bytes(image: Tensor) -> bytes:
    """A picture (3, H, W) in 0..1 as an 8-bit PNG file."""
    file = io.BytesIO()
    Image.fromarray(to_bytes(image)).save(file, "PNG")
    return file.getvalue()


@dataclass(frozen=True)
class Tile:
    """A picture on a contact sheet, with its caption."""

    image: Image.Image
    caption: tuple[str, ...] = ()
    """Lines below the picture, the first dark, the others gray; a long line loses its beginning."""
    frame: tuple[int, int, int] | None = None
    """Color of a frame around the picture."""


def fitted(image: Image.Image, size: int) -> Image.Image:
    """The image in RGB, made smaller or larger so that its longer side has `size` pixels."""
    scale = size / max(image.size)
    shape = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(shape, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC)


def contact_sheet(
    rows: Sequence[Sequence[Tile]], *, size: int = 160, lines: Sequence[int] = (), font_size: int = 13
) -> Image.Image:
    """Rows of small pictures with captions, on white: RGB. ValueError if there is no tile.

    size: side in pixels of the square that each picture is fitted into, in its own shape and
    centered.   lines: columns with a line on their left, which sets them apart.
    """
    columns = max((len(row) for row in rows), default=0)
    if not columns:
        raise ValueError("a contact sheet needs at least one picture")
    font = ImageFont.load_default(font_size)
    line_height = font_size + 4
    tops = [GAP]
    for row in rows:
        count = max((len(tile.caption) for tile in row), default=0)
        tops.append(tops[-1] + size + count * line_height + (4 if count else 0) + GAP)
    lefts = [GAP + column * (size + GAP) + 2 * GAP * sum(line <= column for line in lines) for column in range(columns)]
    sheet = Image.new("RGB", (lefts[-1] + size + GAP, tops[-1]), "white")
    draw = ImageDraw.Draw(sheet)
    for row, top in zip(rows, tops, strict=False):
        for tile, left in zip(row, lefts, strict=False):
            picture = fitted(tile.image, size)
            x, y = left + (size - picture.width) // 2, top + (size - picture.height) // 2
            sheet.paste(picture, (x, y))
            if tile.frame:
                draw.rectangle((x - 3, y - 3, x + picture.width + 2, y + picture.height + 2), outline=tile.frame, width=3)
            for number, text in enumerate(tile.caption):
                place = (left, top + size + 4 + number * line_height)
                draw.text(place, shortened(text, size, font), fill=GRAY if number else INK, font=font)
    for column in lines:
        if column < columns:
            x = lefts[column] - 3 * GAP // 2
            draw.line((x, GAP, x, tops[-1] - GAP), fill=(200, 200, 200))
    return sheet


def shortened(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The text, or dots and as much of its end, which tells files apart, as fits into `width`."""
    text = text.encode("utf-8", "replace").decode()  # a file name need not be text
    if font.getlength(text) <= width:
        return text
    starts = (start for start in range(1, len(text)) if font.getlength(f"...{text[start:]}") <= width)
    return f"...{text[next(starts, len(text)) :]}"
