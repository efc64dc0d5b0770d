"""Bytes of an image file to 8-bit RGB pixels."""

from __future__ import annotations

import io

import numpy as np
import simplejpeg
from PIL import Image


def jpeg_size(file: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG file of one or three channels, which `decode_jpeg` takes; None for every other file."""
    if file[:2] != b"\xff\xd8":
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(file)
    except ValueError:
        return None
    return (height, width) if colorspace in ("YCbCr", "Gray", "RGB") else None


def decode_jpeg(file: bytes, size: tuple[int, int], *, shrink: int = 1) -> np.ndarray | None:
    """RGB (H, W, 3) uint8, the pixels that Pillow makes; None if a byte is wrong (Pillow decides what can be saved).

    size: height and width in the header. shrink: 1, 2, 4 or 8; the image is computed smaller by that factor, rounded up.
    """
    height, width = (-(-side // shrink) for side in size)
    try:
        return simplejpeg.decode_jpeg(file, "RGB", min_height=height, min_width=width, min_factor=shrink)
    except ValueError:
        return None


def decode_other(file: bytes) -> np.ndarray:
    """RGB (H, W, 3) uint8 of any file that Pillow reads."""
    with Image.open(io.BytesIO(file)) as image:
        return np.asarray(image.convert("RGB"))
