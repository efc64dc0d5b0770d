"""The one place where the bytes of a file become an image: 8-bit RGB of whatever is there, or a BrokenImage that says why not.

Pillow decides, as in the published code (torchvision's pil_loader: open and convert to RGB). JPEG files, the common case, are
decoded by simplejpeg, to the bit the same pixels in three quarters of the time; where that finds anything wrong, Pillow has the
last word. What deviates from the published code:

* Transparent pixels are laid on white; a plain conversion would show the colours hidden under them.
* 16-bit samples keep their high byte; a plain conversion of 16-bit grey would clip them to white.
* The EXIF orientation is ignored by default, as published; with `exif_orientation` the image is turned as its tag says. (Pillow
  itself turns a TIFF file, and there the option changes nothing.)
* The size is checked in the header, before any pixel is decoded, against `max_pixels`.

A JPEG file may be decoded at 1/2, 1/4 or 1/8 of its size, but always all of it: 2 + 6 crops together cover 94 % of the rows and
84 % of the pixels of an image on average (5,000 draws, 500 x 375), so that decoding parts could save no more than the rest.

CMYK and YCCK are converted as Pillow does: inverted as Adobe writes them, without colour profiles. Of an animation or a file of
several pages the first is taken. The ending of a file is not believed: a PNG file named x.jpg is read as PNG. Damage that the
decoder does not notice (a changed byte inside the data of a JPEG file) passes.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from dino_simpool.config import MAX_PIXELS

TINY, LONG, HUGE = 32, 10, 50_000_000
"""What `examine` calls tiny (shorter side in pixels below), long (longer side, times the shorter) and huge (pixels above)."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image of each EXIF orientation upright; 1 is upright."""


_ORIENTATION_TAGS = (b"Exif\0", b"tiff:Orientation")
"""A JPEG file without these has no orientation: EXIF data, and XMP, where Pillow looks next."""


class BrokenImage(ValueError):
    """A file that cannot be read as an image. name: of the file.   reason: what is wrong, in one line.

    It can be pickled. What a loader process raises arrives with the text of its traceback as the name and no reason.
    """

    def __init__(self, name: str, reason: str = "") -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name} cannot be read as an image ({self.reason}): repair or remove it" if self.reason else self.name


@dataclass(frozen=True)
class EncodedImage:
    """The bytes of an image file, to be decoded by `read_rgb` with these settings, or faster."""

    file: bytes
    name: str = ""
    max_pixels: int = MAX_PIXELS
    exif_orientation: bool = False

    @cached_property
    def jpeg_size(self) -> tuple[int, int] | None:
        """Height and width of a JPEG file that simplejpeg can take, from its header; None for all other files."""
        if self.file[:2] != b"\xff\xd8" or (self.exif_orientation and any(tag in self.file for tag in _ORIENTATION_TAGS)):
            return None
        try:
            height, width, colors, _ = simplejpeg.decode_jpeg_header(self.file)
        except ValueError:
            return None
        return (height, width) if colors in ("YCbCr", "Gray", "RGB") and height * width <= self.max_pixels else None

    def pixels(self, *, shrink: int = 1) -> np.ndarray:
        """RGB (H, W, 3) uint8. BrokenImage as for `read_rgb`.

        shrink: 1, 2, 4 or 8 for files with a `jpeg_size`, 1 for others; sides are made smaller by it, rounded up.
        """
        if self.jpeg_size is not None:
            height, width = (-(-side // shrink) for side in self.jpeg_size)
            try:
                return simplejpeg.decode_jpeg(self.file, "RGB", min_height=height, min_width=width, min_factor=shrink)
            except ValueError:  # a byte is wrong: Pillow knows whether it matters
                rgb = self.rgb()
                return np.asarray(rgb if shrink == 1 else rgb.reduce(shrink))
        return np.asarray(self.rgb())

    def rgb(self) -> Image.Image:
        """The image as `read_rgb` makes it."""
        return read_rgb(self.file, name=self.name, max_pixels=self.max_pixels, exif_orientation=self.exif_orientation)


@dataclass(frozen=True)
class Examined:
    """What a readable file is."""

    width: int
    """In pixels, as stored."""
    height: int
    kinds: tuple[str, ...]
    """What is unusual about it, such as CMYK or tiny; empty for most files."""


def read_rgb(
    source: str | bytes, *, name: str = "", max_pixels: int = MAX_PIXELS, exif_orientation: bool = False
) -> Image.Image:
    """An image as 8-bit RGB, whatever it holds (see the module).

    source: the path of a file, or its bytes.   name: what an error calls it; by default the path.   max_pixels: width x height
    beyond which it is refused undecoded. More than Pillow itself allows (MAX_PIXELS) raises Pillow's limit in this process.
    exif_orientation: turn it as its EXIF tag says.
    BrokenImage if it is missing, empty, truncated, damaged, too large or no image, or has 32-bit samples, which have no agreed
    range.
    """
    with _opened(source, name=name, max_pixels=max_pixels) as image:
        rgb = _to_rgb(image)
        turn = _UPRIGHT.get(_orientation(image)) if exif_orientation else None
        return rgb if turn is None else rgb.transpose(turn)


def examine(source: str | bytes, *, name: str = "", max_pixels: int = MAX_PIXELS) -> Examined:
    """Decode an image as `read_rgb` does, and say what it is. BrokenImage as there."""
    with _opened(source, name=name, max_pixels=max_pixels) as image:
        (short, long), has = sorted(image.size), image.mode
        kinds = {
            "grey": has.partition(";")[0] in ("1", "L", "LA", "I"),
            "16-bit": has.startswith("I") or ";16" in str(image.tile),
            "palette": has in ("P", "PA"),
            "transparent": image.has_transparency_data,
            "CMYK": has == "CMYK",
            "several frames": getattr(image, "is_animated", False),
            "EXIF-rotated": _orientation(image) in _UPRIGHT,
            "tiny": short < TINY,
            "long": long > LONG * short,
            "huge": short * long > HUGE,
        }
        found = Examined(image.width, image.height, tuple(kind for kind, present in kinds.items() if present))
    read_rgb(source, name=name, max_pixels=max_pixels)
    return found


@contextmanager
def _opened(source: str | bytes, *, name: str, max_pixels: int) -> Iterator[ImageFile.ImageFile]:
    """A file whose header is read and whose size is allowed; whatever goes wrong with it is a BrokenImage."""
    name = name or (source if isinstance(source, str) else "an image")
    limit = Image.MAX_IMAGE_PIXELS  # Pillow warns above it and refuses the double
    if limit is not None and max_pixels > max(MAX_PIXELS, 2 * limit):
        Image.MAX_IMAGE_PIXELS = max_pixels  # only upwards and on request; it would refuse crops of the image, too
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.width * image.height > max_pixels:
                raise Image.DecompressionBombError
            yield image
    except Exception as error:  # decoders raise what they like, from SyntaxError to struct.error
        raise BrokenImage(name, " ".join(_reason(error, source, max_pixels).split())) from error


def _reason(error: Exception, source: str | bytes, max_pixels: int) -> str:
    """What is wrong with a file, without its name."""
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than max_pixels {max_pixels:,}; raise that if the file is what it should be"
    if isinstance(error, UnidentifiedImageError):
        empty = (len(source) if isinstance(source, bytes) else os.path.getsize(source)) == 0
        return "it is empty" if empty else "it is no image of a known format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # the whole text would repeat the path
    return str(error) or type(error).__name__


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 if there is none."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF data says nothing about the orientation, and nothing against the pixels
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        samples = np.asarray(image)
        if samples.dtype.kind == "f" or samples.min() < 0 or samples.max() > 65535:
            raise ValueError("it has 32-bit samples; 8 and 16 bits are known")
        image = Image.fromarray((samples >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
