"""Decodes image files: the one place where bytes become 8-bit RGB or a BrokenImage.

Pillow decides, as in the published code (torchvision's pil_loader: open and convert to RGB). JPEG
files that simplejpeg finds nothing wrong with are decoded by it, which gives bit-identical pixels
in three quarters of the time. Deviations from the published code:

* Transparent pixels are composed on white. A plain conversion would show their hidden colors.
* 16-bit samples keep their high byte. A plain conversion of 16-bit gray would clip them to white.
* Files that Pillow would misread are refused by the property that it ignores: separate planes of
  16 bits, signed and floating-point samples, samples of 32 bits, more than four bands.
* 16-bit gray TIFF files with 0 as white are inverted, as those of 8 bits are by Pillow.
* PostScript is refused: Pillow would start Ghostscript to draw it.
* The EXIF orientation is ignored by default, as published. With `exif_orientation` the image is
  rotated according to its tag. (Pillow itself rotates TIFF files, with or without the option.)
* The size in the header is checked against `max_pixels` before any pixel is decoded.

A JPEG file can be decoded at 1/2, 1/4 or 1/8 of its size, but always as a whole: 2 + 6 crops
together cover 94 % of the rows and 84 % of the pixels of an image on average (5,000 draws,
500 x 375), so decoding only parts could save no more than the rest.

CMYK and YCCK are converted as in Pillow: inverted as Adobe writes them, without color profiles. The
first frame or page is used if there are several. The file extension is ignored. Damage that the
decoder does not notice (a changed byte in the data of a JPEG file) stays unnoticed.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageFile, TiffImagePlugin, UnidentifiedImageError

from dino_simpool.config import MAX_PIXELS

TINY, LONG, HUGE = 32, 10, 50_000_000
"""Limits of `examine`: shorter side of tiny images, in pixels; longer side of long images, as a
multiple of the shorter; pixels of huge images."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The operation that turns an image of each EXIF orientation upright; 1 is upright."""
_ORIENTATION_TAGS = (b"Exif\0", b"tiff:Orientation")
"""Markers of EXIF data and XMP. Without them a JPEG has no orientation for Pillow."""


_UNREADABLE = {
    rb"%!PS|\xc5\xd0\xd3\xc6": "PostScript, which takes another program to draw; convert it to PNG",
    rb"%PDF": "a PDF document; convert its pages to PNG",
    rb"....ftyp(hei|hev|mif1|msf1)": "HEIC, which is not supported; convert it to JPEG",
    rb"\xff\x0a|\0\0\0\x0cJXL ": "JPEG XL, which is not supported; convert it to PNG",
    rb"....ftyp(?!avi[fs])|RIFF....AVI |\x1aE\xdf\xa3": "a video; extract its frames",
    rb"version https://git-lfs": "a Git LFS pointer, not the image; run git lfs pull",
    rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*(<!doctype svg[^>]*>\s*)?<svg": "an SVG drawing; convert it to PNG",
    rb"\s*<(!doctype html|html|head)": "a web page, probably a failed download; download the image again",
}
"""Start of files that Pillow does not know, or is not allowed to open: what they are, what to do.
The first that fits counts."""


class BrokenImage(ValueError):
    """A file that cannot be read as an image: its name, and what is wrong, in one line.

    From a loader process it arrives with the text of the traceback as the name and no reason.
    """

    def __init__(self, name: str, reason: str = "") -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name} cannot be read as an image ({self.reason}): repair or remove it" if self.reason else self.name


@dataclass(frozen=True)
class EncodedImage:
    """The bytes of an image file, and the settings of `read_rgb` to decode them with."""

    file: bytes
    name: str = ""
    max_pixels: int = MAX_PIXELS
    exif_orientation: bool = False

    @cached_property
    def jpeg_size(self) -> tuple[int, int] | None:
        """Height and width from the header of a JPEG file for simplejpeg; None for other files."""
        if self.file[:2] != b"\xff\xd8" or (self.exif_orientation and any(tag in self.file for tag in _ORIENTATION_TAGS)):
            return None
        try:
            height, width, colors, _ = simplejpeg.decode_jpeg_header(self.file)
        except ValueError:
            return None
        return (height, width) if colors in ("YCbCr", "Gray", "RGB") and height * width <= self.max_pixels else None

    def pixels(self, *, shrink: int = 1) -> np.ndarray:
        """RGB (H, W, 3) uint8. BrokenImage as for `read_rgb`.

        shrink: factor that divides the sides, rounded up; 1, 2, 4 or 8 with a `jpeg_size`, else 1.
        """
        if self.jpeg_size is not None:
            height, width = (-(-side // shrink) for side in self.jpeg_size)
            with suppress(ValueError):  # something is wrong, and Pillow decides whether it matters
                return simplejpeg.decode_jpeg(self.file, "RGB", min_height=height, min_width=width, min_factor=shrink)
        return np.asarray(self.rgb().reduce(shrink))

    def rgb(self) -> Image.Image:
        """The image as returned by `read_rgb`."""
        return read_rgb(self.file, name=self.name, max_pixels=self.max_pixels, exif_orientation=self.exif_orientation)


@dataclass(frozen=True)
class Examined:
    """The properties of a readable image file."""

    width: int
    """In pixels, as stored."""
    height: int
    kinds: tuple[str, ...]
    """What is unusual, such as CMYK or tiny; empty for most files."""


def read_rgb(
    source: str | bytes, *, name: str = "", max_pixels: int = MAX_PIXELS, exif_orientation: bool = False
) -> Image.Image:
    """Decode an image of any kind to 8-bit RGB (see the module).

    source: the path of a file, or its bytes.   name: for errors; by default the path.
    max_pixels: the largest allowed width x height. A value above Pillow's own limit (MAX_PIXELS)
    raises that limit in this process.   BrokenImage if the file is missing, empty, truncated,
    broken, too large or not an image, or has samples or bands that are not supported.
    """
    with _opened(source, name=name, max_pixels=max_pixels) as image:
        rgb = _to_rgb(image)
        turn = _UPRIGHT.get(_orientation(image)) if exif_orientation else None
        return rgb if turn is None else rgb.transpose(turn)


def examine(source: str | bytes, *, name: str = "", max_pixels: int = MAX_PIXELS) -> Examined:
    """Decode an image like `read_rgb`, and return its properties. BrokenImage as there."""
    with _opened(source, name=name, max_pixels=max_pixels) as image:
        (short, long), has = sorted(image.size), image.mode
        kinds = {
            "gray": has.partition(";")[0] in ("1", "L", "LA", "I"),
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


def open_image(source: str | bytes | Path) -> ImageFile.ImageFile:
    """Image.open of a path or of the bytes of a file. It starts no other program: of Pillow's
    formats, only PostScript needs one, and is left out. Errors are Pillow's."""
    Image.init()
    formats = [name for name in Image.ID if name != "EPS"]
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats)


@contextmanager
def _opened(source: str | bytes, *, name: str, max_pixels: int) -> Iterator[ImageFile.ImageFile]:
    """Open a file, with its header read and its size checked. Any error becomes a BrokenImage."""
    name = name or (source if isinstance(source, str) else "an image")
    limit = Image.MAX_IMAGE_PIXELS  # Pillow warns above this and refuses twice as much
    if limit is not None and max_pixels > max(MAX_PIXELS, 2 * limit):
        Image.MAX_IMAGE_PIXELS = max_pixels  # only raised, and on request: Pillow checks crops too
    try:
        with open_image(source) as image:
            if image.width * image.height > max_pixels:
                raise Image.DecompressionBombError
            _check_samples(image)
            yield image
    except Exception as error:  # decoders raise anything from SyntaxError to struct.error
        raise BrokenImage(name, " ".join(_reason(error, source, max_pixels).split())) from error


def _reason(error: Exception, source: str | bytes, max_pixels: int) -> str:
    """What is wrong with a file, without its name."""
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than max_pixels {max_pixels:,}; raise max_pixels if the file is valid"
    if isinstance(error, UnidentifiedImageError):
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
            start = file.read(256)
        named = (
            f"it is {what}" for pattern, what in _UNREADABLE.items() if re.match(pattern, start, re.IGNORECASE | re.DOTALL)
        )
        return next(named, "it is not an image of a known format" if start else "it is empty")
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # the full text would repeat the path
    return str(error) or type(error).__name__


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 if there is none."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken EXIF data gives no orientation, but the pixels may be fine
        return 1


def _check_samples(image: Image.Image) -> None:
    """ValueError, by the property that Pillow ignores, if it would misread the samples."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        tags = image.tag_v2
        bits, bands = max(tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,))), tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1)
        if bands > 4:
            raise ValueError(f"it has {bands} bands; at most 4 are supported")
        if kind := {2: "signed", 3: "floating-point"}.get(max(tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,)))):
            raise ValueError(f"it has {kind} samples; only unsigned samples of 8 and 16 bits are supported")
        if bits == 16 and bands > 1 and tags.get(TiffImagePlugin.PLANAR_CONFIGURATION) == 2:
            raise ValueError("it has 16-bit samples in separate planes; store the bands of a pixel together")
    else:  # Pillow reads PGM files of 16 bits as 32-bit integers
        bits = 32 if image.mode == "F" or (image.mode == "I" and image.format != "PPM") else 8
    if bits not in (1, 2, 4, 8, 16):
        raise ValueError(f"it has {bits}-bit samples; only 8 and 16 bits are supported")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        samples = np.asarray(image)
        if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2[TiffImagePlugin.PHOTOMETRIC_INTERPRETATION] == 0:
            samples = 65535 - samples  # 0 is white, which Pillow heeds up to 8 bits
        image = Image.fromarray((samples >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
