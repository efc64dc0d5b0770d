"""What a file declares about its samples: bits, bands, planes, signs and colors.

Pillow ignores some of it. Files that it would misread are refused by that property, in the words of
the TIFF 6.0 specification. Of 16-bit samples of several bands Pillow keeps only the high byte;
where that is not enough, OpenCV reads them. Which kinds either library reads right was found by
comparing both with known samples, as tests/data/test_samples.py does for every kind.
"""

from __future__ import annotations

import re
from io import BytesIO

import cv2
import numpy as np
from PIL import Image, TiffImagePlugin
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile

from dino_simpool.config import DecodingSettings

# Silent, since errors are raised here. The function moved in OpenCV 4.13.
getattr(cv2.utils, "logging", cv2).setLogLevel(0)

GRAY_LEVELS = {"white": 255, "black": 0, "gray": 128}
"""The background colors of DecodingSettings.transparency."""
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _CMYK, _YCBCR = 0, 1, 2, 3, 5, 6
_COLORS = {0: "0 is white", 1: "0 is black", 2: "RGB", 3: "palette", 4: "mask", 5: "CMYK", 6: "YCbCr", 8: "CIELAB",
           9: "ICC LAB", 10: "ITU LAB", 32844: "LogL", 32845: "LogLuv"}  # fmt: skip
_UNSPECIFIED, _PREMULTIPLIED, _ALPHA = 0, 1, 2  # meanings of an extra band


class Tiff:
    """The properties of a TIFF file."""

    def __init__(self, tags: ImageFileDirectory_v2) -> None:
        self.tags = tags
        self.bands: int = tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1)
        self.bits: int = max(tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,)))
        self.colors: int | None = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION)
        self.extra: tuple[int, ...] = tags.get(TiffImagePlugin.EXTRASAMPLES, ())
        self.separate = self.bands > 1 and tags.get(TiffImagePlugin.PLANAR_CONFIGURATION) == 2

    @classmethod
    def of(cls, file: bytes) -> Tiff:
        """From a file that Pillow does not identify."""
        stream = BytesIO(file)
        tags = ImageFileDirectory_v2(stream.read(16 if file[2:4] in (b"\x2b\0", b"\0\x2b") else 8))
        stream.seek(tags.next)
        tags.load(stream)
        return cls(tags)

    @property
    def undeclared_band(self) -> bool:
        """Whether the band after gray or RGB is not declared as alpha."""
        expected = {_WHITE_IS_ZERO: 2, _BLACK_IS_ZERO: 2, _RGB: 4}.get(-1 if self.colors is None else self.colors)
        return self.bands == expected and self.extra in ((), (_UNSPECIFIED,))

    def __str__(self) -> str:
        order = "big-endian" if self.tags.prefix == b"MM" else "little-endian"
        extra = {(): "", (_PREMULTIPLIED,): ", premultiplied alpha", (_ALPHA,): ", alpha"}.get(self.extra, ", extra bands")
        colors = _COLORS.get(-1 if self.colors is None else self.colors, "unknown colors")
        fill = "" if self.tags.get(TiffImagePlugin.FILLORDER, 1) == 1 else ", fill order 2"
        return f"{self.bands} x {self.bits} bits, {colors}{extra}{', separate planes' if self.separate else ''}, {order}{fill}"

    def check(self) -> None:
        """ValueError, by the property that Pillow ignores, if it would misread the samples."""
        tags = self.tags
        if self.bands > 4:
            raise ValueError(_too_many(self.bands))
        if kind := {2: "signed", 3: "floating-point"}.get(max(tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,)))):
            raise ValueError(f"it has {kind} samples; only unsigned samples of 8 and 16 bits are supported")
        if tags.get(TiffImagePlugin.COMPRESSION) == 50001:
            raise ValueError("it has WebP compression inside of TIFF; save it with another one")
        if self.bits not in (1, 2, 4, 8, 16):
            raise ValueError(f"it has {self.bits}-bit samples; only 8 and 16 bits are supported")
        simple = self.bits == 8 and self.colors in (_RGB, _CMYK) and self.extra in ((), (_ALPHA,))
        if self.separate and not simple:
            raise ValueError(f"it has {self.bits}-bit samples in separate planes; store the bands of a pixel together")
        if self.colors in (8, 9, 10):
            raise ValueError("it has CIELAB colors; convert it to RGB")
        if self.colors == _YCBCR and self.bands == 3:
            shrunk = tuple(tags.get(TiffImagePlugin.YCBCRSUBSAMPLING, (2, 2)))
            if shrunk == (4, 4) or (shrunk != (1, 1) and tags.get(TiffImagePlugin.COMPRESSION, 1) == 1):
                raise ValueError("it has YCbCr colors at a lower resolution without JPEG compression; convert it to RGB")
            black_and_white = tuple(map(float, tags.get(TiffImagePlugin.REFERENCEBLACKWHITE, (0, 255, 128, 255, 128, 255))))
            if any(abs(a - b) > 1 for a, b in zip(black_and_white, (0, 255, 128, 255, 128, 255), strict=False)):
                raise ValueError("it has YCbCr colors of a limited range; convert it to RGB")
        if self.colors == _PALETTE and max(tags.get(TiffImagePlugin.COLORMAP, (256,))) < 256:
            raise ValueError("its palette has 8-bit colors in place of 16-bit ones; save it again")


def check_samples(image: Image.Image, settings: DecodingSettings) -> None:
    """ValueError, by the property, if Pillow would misread the samples, or if a band is not alpha
    and `settings` do not say what it is."""
    if isinstance(image, TiffImageFile):
        Tiff(image.tag_v2).check()
    elif image.mode == "F" or (image.mode == "I" and image.format != "PPM"):  # a PGM file of 16 bits has this mode
        raise ValueError("it has 32-bit samples; only 8 and 16 bits are supported")
    elif image.mode.startswith("I;16") and image.format == "FITS":
        raise ValueError("it has signed samples; only unsigned samples of 8 and 16 bits are supported")
    if settings.extra_band == "refuse" and has_undeclared_band(image):
        which = "fourth" if len(image.getbands()) > 2 else "second"
        raise ValueError(
            f"its {which} band is not declared as alpha; set extra_band to ignore, or to alpha to take it as transparency "
            "(there are no encoders of other than three channels)"
        )


def has_undeclared_band(image: Image.Image) -> bool:
    """Whether there is a band after gray or RGB that the file does not declare as alpha."""
    if isinstance(image, TiffImageFile):
        return Tiff(image.tag_v2).undeclared_band
    return image.format == "JPEG2000" and image.mode in ("LA", "RGBA") and b"cdef" not in _header(image)


def has_16_bits(image: Image.Image) -> bool:
    """Whether samples have more than 8 bits, from the header of an image that is not loaded yet."""
    if image.format == "JPEG2000":
        return _bits_of_jpeg_2000(image) > 8
    return image.mode.startswith("I") or ";16" in str(image.tile) or _highest(image) > 255  # type: ignore[attr-defined]


def samples_of(image: Image.Image, file: bytes) -> np.ndarray:
    """The samples (H, W, bands) uint16 of an image of more than 8 bits: gray or RGB, perhaps with
    alpha, which is not premultiplied. Those of formats that declare fewer bits are scaled to 16.

    file: the bytes that the image was opened from. ValueError if OpenCV cannot read the bands.
    """
    if image.mode.startswith("I"):
        gray = np.asarray(image).astype(np.uint16)
        if isinstance(image, TiffImageFile) and image.tag_v2[TiffImagePlugin.PHOTOMETRIC_INTERPRETATION] == _WHITE_IS_ZERO:
            gray = 65535 - gray  # which Pillow heeds up to 8 bits
        clear = image.info.get("transparency")
        return gray[..., None] if clear is None else np.stack([gray, np.where(gray == clear, 0, 65535).astype(np.uint16)], -1)
    samples = cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_UNCHANGED)
    if samples is None or samples.dtype != np.uint16 or samples.ndim != 3:
        raise ValueError("its 16-bit samples cannot be read exactly; save it as PNG, or as TIFF without compression")
    samples = samples[..., [2, 1, 0, 3][: samples.shape[2]]]
    if image.format == "JPEG2000":
        samples = np.left_shift(samples, 16 - _bits_of_jpeg_2000(image))
    elif (highest := _highest(image)) not in (0, 65535):
        samples = (samples * (65535 / highest)).round().astype(np.uint16)
    if isinstance(image, TiffImageFile) and Tiff(image.tag_v2).extra == (_PREMULTIPLIED,):
        colors, alpha = samples[..., :3].astype(np.float64), samples[..., 3:]
        samples[..., :3] = np.minimum(65535, colors * 65535 / np.maximum(alpha, 1)).round()
    return samples


def range_of(samples: np.ndarray, share: float) -> tuple[int, int]:
    """The range of samples (H, W, bands) of colors and perhaps alpha, without the given share, in
    %, at either end. Transparent pixels do not count."""
    colors = samples[..., : samples.shape[-1] - 1 + samples.shape[-1] % 2]
    if samples.shape[-1] % 2 == 0 and samples[..., -1].any():
        colors = colors[samples[..., -1] > 0]
    low, high = np.percentile(colors, (share, 100 - share))
    return (int(low), int(np.ceil(high))) if low < high else (int(colors.min()), int(colors.max()))


def to_8_bits(samples: np.ndarray, settings: DecodingSettings) -> Image.Image:
    """The image (L or RGB) of 16-bit samples, composed on the background if there is alpha."""
    assert settings.value_range != "data", "replaced by two numbers in `with_range_of`"
    if settings.value_range == "full":
        level = np.arange(65536, dtype=np.float32) / 256  # its whole part is the high byte
    else:
        low, high = range_of(samples, 1) if settings.value_range == "percentiles" else settings.value_range
        level = (np.clip(np.arange(65536, dtype=np.float32), low, high) - low) * 255 / max(1, high - low) + 0.5
    has_alpha = samples.shape[-1] in (2, 4)
    colors = samples[..., :-1] if has_alpha else samples
    if has_alpha and settings.transparency != "ignore":
        opacity = samples[..., -1:].astype(np.float32) / 65535
        pixels = (level[colors] * opacity + GRAY_LEVELS[settings.transparency] * (1 - opacity)).astype(np.uint8)
    else:
        pixels = level.astype(np.uint8)[colors]
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def _bits_of_jpeg_2000(image: Image.Image) -> int:
    size = re.search(rb"\xff\x4f\xff\x51.{38}(.)", _header(image), re.DOTALL)  # the first marker segment
    return 1 + (size[1][0] & 127) if size else 8


def _highest(image: Image.Image) -> int:
    """The highest sample that a PNM file declares, if Pillow scales by it; 0 for other files."""
    arguments = image.tile[0].args if image.format == "PPM" and image.tile else ""  # type: ignore[attr-defined]
    return arguments[1] if isinstance(arguments, tuple) and len(arguments) == 2 else 0  # raw mode and maximum


def _header(image: Image.Image) -> bytes:
    """The first bytes of the file of an image that is not loaded yet."""
    file = image.fp  # type: ignore[attr-defined]
    place = file.tell()
    file.seek(0)
    start = bytes(file.read(2**16))
    file.seek(place)
    return start


def _too_many(bands: int) -> str:
    return f"it has {bands} bands; at most 4 are supported, as there are no encoders of other than three channels"
