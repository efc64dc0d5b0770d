"""Decodes image files: the one place where bytes become 8-bit RGB or a BrokenImage.

Pillow decides, as in the published code (torchvision's pil_loader: open and convert to RGB). JPEG
files that simplejpeg finds nothing wrong with are decoded by it, which gives bit-identical pixels
in three quarters of the time. Deviations from the published code:

* Transparent pixels are composed on white, or as `transparency` says. A plain conversion would show
  their hidden colors.
* 16-bit samples keep their high byte, or `value_range` maps them to black and white. A plain
  conversion of 16-bit gray would clip them to white.
* Files that Pillow would misread are refused by the property that it ignores (samples.py), and so
  are those with a band that is not declared as alpha, unless `extra_band` says what it is.
* 16-bit gray TIFF files with 0 as white are inverted, as those of 8 bits are by Pillow.
* PostScript is refused: Pillow would start Ghostscript to draw it.
* PNG and JPEG files whose text, profile or other metadata are damaged or large are read without
  them, as browsers do. Pillow refuses them.
* HEIC and JPEG XL are read if Pillow's plug-in for them is installed.
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

import importlib
import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageFile, TiffImagePlugin, UnidentifiedImageError

from dino_simpool.config import DEFAULT_DECODING, MAX_PIXELS, DecodingSettings
from dino_simpool.data.metadata import without_metadata
from dino_simpool.data.samples import Tiff, check_samples, has_16_bits, has_undeclared_band, range_of, samples_of, to_8_bits
from dino_simpool.names import shown

# Warnings of damaged metadata, which no pixel depends on, would come for each image of a training.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

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

_PLUG_INS = {
    rb"....ftyp(hei|hev|mif1|msf1)": ("HEIC", "pillow_heif", "pillow-heif"),
    rb"\xff\x0a|\0\0\0\x0cJXL ": ("JPEG XL", "pillow_jxl", "pillow-jxl-plugin"),
    rb"....ftypavi[fs]": ("AVIF", "pillow_avif", "pillow-avif-plugin"),
}
"""Start of files that Pillow knows with a plug-in only (AVIF: in some of its builds): what they
are, and the module and the package of the plug-in."""
_UNREADABLE = {
    rb"%!PS|\xc5\xd0\xd3\xc6": "PostScript, which takes another program to draw; convert it to PNG",
    rb"%PDF": "a PDF document; convert its pages to PNG",
    rb"....ftyp|RIFF....AVI |\x1aE\xdf\xa3": "a video; extract its frames",
    rb"P7\s": "a PAM file; convert it to PNG",
    rb"PF\s": "a PFM file of floating-point samples; convert it to PNG",
    rb"PK\x03\x04": "a zip archive; if it holds images, give it a name that ends in .zip",
    rb".{257}ustar": "a tar archive; give it a name that ends in .tar",
    rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!": "compressed; unpack it",
    rb"\x93NUMPY|PAR1|\x89HDF|SQLite format": "an array, a table or a database; save its images as PNG files",
    rb"version https://git-lfs": "a Git LFS pointer, not the image; run git lfs pull",
    rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*(<!doctype svg[^>]*>\s*)?<svg": "an SVG drawing; convert it to PNG",
    rb"\s*<(!doctype html|html|head)": "a web page, probably a failed download; download the image again",
}
"""Start of files that Pillow does not know, or is not allowed to open: what they are, what to do.
The first that fits counts, after _PLUG_INS."""

_ANY_BANDS = replace(DEFAULT_DECODING, extra_band="ignore")

T = TypeVar("T")


class BrokenImage(ValueError):
    """A file that cannot be read as an image: its name, and what is wrong, in one line.

    From a loader process it arrives with the text of the traceback as the name and no reason.
    """

    def __init__(self, name: str, reason: str = "") -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return (
            f"{shown(self.name)} cannot be read as an image ({self.reason}): repair or remove it" if self.reason else self.name
        )


@dataclass(frozen=True)
class EncodedImage:
    """The bytes of an image file, and how to decode them."""

    file: bytes
    name: str = ""
    decoding: DecodingSettings = DEFAULT_DECODING

    @cached_property
    def jpeg_size(self) -> tuple[int, int] | None:
        """Height and width from the header of a JPEG file for simplejpeg; None for other files."""
        if self.file[:2] != b"\xff\xd8" or (
            self.decoding.exif_orientation and any(tag in self.file for tag in _ORIENTATION_TAGS)
        ):
            return None
        try:
            height, width, colors, _ = simplejpeg.decode_jpeg_header(self.file)
        except ValueError:
            return None
        return (height, width) if colors in ("YCbCr", "Gray", "RGB") and height * width <= self.decoding.max_pixels else None

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
        return read_rgb(self.file, name=self.name, decoding=self.decoding)


@dataclass(frozen=True)
class Examined:
    """The properties of a readable image file."""

    width: int
    """In pixels, as stored."""
    height: int
    kinds: tuple[str, ...]
    """What is unusual, such as CMYK or tiny; empty for most files."""
    samples: tuple[int, int] | None = None
    """The 1st and the 99th percentile of 16-bit samples; None for other files."""


def read_rgb(source: str | bytes, *, name: str = "", decoding: DecodingSettings = DEFAULT_DECODING) -> Image.Image:
    """Decode an image of any kind to 8-bit RGB (see the module).

    source: the path of a file, or its bytes.   name: for errors; by default the path.
    decoding.max_pixels: the largest allowed width x height. A value above Pillow's own limit
    (MAX_PIXELS) raises that limit in this process.   BrokenImage if the file is missing, empty,
    truncated, broken, too large or not an image, or has samples or bands that are not supported.
    """
    return _with_or_without_metadata(partial(_decode, name=name, decoding=decoding), source)[0]


def examine(source: str | bytes, *, name: str = "", decoding: DecodingSettings = DEFAULT_DECODING) -> Examined:
    """Decode an image like `read_rgb`, and return its properties. BrokenImage as there."""
    found, skipped = _with_or_without_metadata(partial(_examine, name=name, decoding=decoding), source)
    return replace(found, kinds=(*found.kinds, "metadata skipped")) if skipped else found


def open_image(source: str | bytes | Path) -> ImageFile.ImageFile:
    """Image.open of a path or of the bytes of a file. It starts no other program: of Pillow's
    formats, only PostScript needs one, and is left out. Errors are Pillow's."""
    Image.init()
    opener = partial(Image.open, io.BytesIO(source) if isinstance(source, bytes) else source)
    try:
        return opener(formats=_formats())
    except UnidentifiedImageError:
        start = _start_of(source)
        if any(re.match(pattern, start, re.DOTALL) and _plugged_in(module) for pattern, (_, module, _) in _PLUG_INS.items()):
            return opener(formats=_formats())
        raise


def is_known_format(path: str) -> bool:
    """Whether a file begins as an image does that can be read, whatever its name."""
    try:
        with open_image(path):
            return True
    except Exception:  # openers raise anything
        return False


def has_more_than_8_bits(source: str | bytes) -> bool:
    """Whether `samples_in_16_bits` has samples of a file to return, from its header alone."""
    try:
        with _opened(source, name="", decoding=_ANY_BANDS) as image:
            return has_16_bits(image) and image.mode != "CMYK"
    except BrokenImage:
        return False


def samples_in_16_bits(source: str | bytes) -> np.ndarray:
    """The samples (H, W, bands) of a gray or RGB file of more than 8 bits, as `samples_of` returns
    them. BrokenImage as for `read_rgb`."""
    with _opened(source, name="", decoding=_ANY_BANDS) as image:
        return samples_of(image, _content(source))


def _decode(source: str | bytes, *, name: str, decoding: DecodingSettings) -> Image.Image:
    with _opened(source, name=name, decoding=decoding) as image:
        rgb = _to_rgb(image, source, decoding)
        turn = _UPRIGHT.get(_orientation(image)) if decoding.exif_orientation else None
        return rgb if turn is None else rgb.transpose(turn)


def _examine(source: str | bytes, *, name: str, decoding: DecodingSettings) -> Examined:
    with _opened(source, name=name, decoding=decoding) as image:
        (short, long), has = sorted(image.size), image.mode
        kinds = {
            "gray": has.partition(";")[0] in ("1", "L", "LA", "La", "I"),
            "16-bit": has_16_bits(image),
            "palette": has in ("P", "PA"),
            "transparent": image.has_transparency_data,
            "extra band": has_undeclared_band(image),
            "CMYK": has == "CMYK",
            "several frames": getattr(image, "is_animated", False),
            "EXIF-rotated": _orientation(image) in _UPRIGHT,
            "tiny": short < TINY,
            "long": long > LONG * short,
            "huge": short * long > HUGE,
        }
        width, height = image.size
    shown = _decode(source, name=name, decoding=decoding)
    kinds["blank"] = shown.getcolors(1) is not None
    used = None
    if has_more_than_8_bits(source):
        with suppress(BrokenImage):  # only the high bytes can be read, which is enough for `shown`
            used = range_of(samples_in_16_bits(source), 1)
    return Examined(width, height, tuple(kind for kind, present in kinds.items() if present), used)


def _with_or_without_metadata(read: Callable[[str | bytes], T], source: str | bytes) -> tuple[T, bool]:
    """read(source), and whether that took leaving out metadata of the file."""
    try:
        return read(source), False
    except BrokenImage as error:
        with suppress(OSError):  # which is the error already
            for file in without_metadata(_content(source)):
                with suppress(BrokenImage):
                    return read(file), True
        raise error


def _formats() -> list[str]:
    return [name for name in Image.ID if name != "EPS"]


@cache
def _plugged_in(module: str) -> bool:
    """Whether a plug-in of Pillow is installed. It is registered then."""
    try:
        plug_in = importlib.import_module(module)
    except ImportError:
        return False
    if module == "pillow_heif":  # the others register themselves
        plug_in.register_heif_opener()
    return True


def _start_of(source: str | bytes | Path) -> bytes:
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        return file.read(512)


@contextmanager
def _opened(source: str | bytes, *, name: str, decoding: DecodingSettings) -> Iterator[ImageFile.ImageFile]:
    """Open a file, with its header read and its size checked. Any error becomes a BrokenImage."""
    name = name or (source if isinstance(source, str) else "an image")
    max_pixels, limit = decoding.max_pixels, Image.MAX_IMAGE_PIXELS  # Pillow warns above this and refuses twice as much
    if limit is not None and max_pixels > max(MAX_PIXELS, 2 * limit):
        Image.MAX_IMAGE_PIXELS = max_pixels  # only raised, and on request: Pillow checks crops too
    try:
        with open_image(source) as image:
            if image.width * image.height > max_pixels:
                raise Image.DecompressionBombError
            check_samples(image, decoding)
            yield image
    except Exception as error:  # decoders raise anything from SyntaxError to struct.error
        raise BrokenImage(name, " ".join(_reason(error, source, max_pixels).split())) from error


def _reason(error: Exception, source: str | bytes, max_pixels: int) -> str:
    """What is wrong with a file, without its name."""
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than max_pixels {max_pixels:,}; raise max_pixels if the file is valid"
    if isinstance(error, UnidentifiedImageError) or "raw mode" in str(error):
        start = _start_of(source)
        for pattern, (what, module, package) in _PLUG_INS.items():
            if re.match(pattern, start, re.DOTALL):
                if _plugged_in(module):
                    return f"it is broken {what}"
                return f"it is {what}, which needs a plug-in: pip install {package}, or convert it to PNG"
        named = (
            f"it is {what}" for pattern, what in _UNREADABLE.items() if re.match(pattern, start, re.IGNORECASE | re.DOTALL)
        )
        if start.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
            return _reason_of_tiff(_content(source))
        return next(named, "it is not an image of a known format" if start else "it is empty")
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # the full text would repeat the path
    return str(error) or type(error).__name__


def _reason_of_tiff(file: bytes) -> str:
    """Why Pillow does not identify a TIFF file."""
    with suppress(Exception):  # the tags may be broken too
        tiff = Tiff.of(file)
        try:
            tiff.check()
        except ValueError as error:
            return str(error)
        return f"it is a TIFF file of a kind that is not supported ({tiff}); save it as PNG"
    return "it is not an image of a known format"


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 if there is none."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken EXIF data gives no orientation, but the pixels may be fine
        return 1


def _to_rgb(opened: ImageFile.ImageFile, source: str | bytes, decoding: DecodingSettings) -> Image.Image:
    image: Image.Image = opened
    if has_undeclared_band(opened):
        if decoding.extra_band == "ignore":
            decoding = replace(decoding, transparency="ignore")
        elif isinstance(opened, TiffImagePlugin.TiffImageFile):
            opened.tag_v2[TiffImagePlugin.EXTRASAMPLES] = (2,)  # alpha
            opened._setup()
    if has_16_bits(opened) and image.mode != "CMYK":
        # Pillow keeps high bytes, but not of transparency; in JPEG 2000 it turns white black.
        kept = opened.format == "PPM" or (opened.format != "JPEG2000" and not image.has_transparency_data)
        if image.mode.startswith("I") or decoding.value_range != "full" or not kept:
            return to_8_bits(samples_of(opened, _content(source)), decoding).convert("RGB")
    if image.mode == "L" and "transparency" in image.info and (bits := re.search(r"'L;([24])'", str(opened.tile))):
        image.info["transparency"] *= 255 // (2 ** int(bits[1]) - 1)  # Pillow scales the samples alone
    if image.mode == "La":  # premultiplied
        image = image.convert("LA")
    if image.has_transparency_data and decoding.transparency != "ignore":
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, decoding.transparency), image).convert("RGB")
    return image.convert("RGB")


def _content(source: str | bytes) -> bytes:
    return source if isinstance(source, bytes) else Path(source).read_bytes()
