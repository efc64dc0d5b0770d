"""What the headers of a set of images say: their sides, and the range of 16-bit samples that they
use: what `value_range: data` means, and when to advise it. Cameras and scanners store 10, 12 or 14
bits in files of 16."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from dino_simpool.config import DecodingSettings
from dino_simpool.data.decode import BrokenImage, has_more_than_8_bits, open_image, samples_in_16_bits
from dino_simpool.data.samples import range_of
from dino_simpool.data.sources import ImageSet, evenly

LOOKED_AT = 200
"""Images of a set whose headers are read."""
NARROW = 65536 // 8
"""A range below this is worth a warning: 32 of 256 gray levels."""


def with_range_of(images: ImageSet, decoding: DecodingSettings) -> DecodingSettings:
    """The settings with two numbers in place of a `value_range` of `data`; full if no image looked
    at has 16 bits."""
    if decoding.value_range != "data":
        return decoding
    used = used_range(images, share=0)
    return replace(decoding, value_range=used if used is not None and used[0] < used[1] else "full")


def used_range(images: ImageSet, *, share: float, most: int = LOOKED_AT) -> tuple[int, int] | None:
    """The range of the 16-bit samples of at most `most` images, evenly spread over the set, each
    without `share` % of its samples at either end. None if there are none; broken ones are skipped.
    """
    deep = [number for number in evenly(len(images), LOOKED_AT).tolist() if _has_16_bits(images, number)]
    ranges = []
    for place in evenly(len(deep), most).tolist() if deep else ():
        with suppress(BrokenImage):
            ranges.append(range_of(samples_in_16_bits(images.header_source(deep[place])), share))
    return (min(low for low, _ in ranges), max(high for _, high in ranges)) if ranges else None


def shorter_sides(images: ImageSet, *, most: int) -> list[int]:
    """The shorter sides in pixels of at most `most` images, evenly spread over the set, from their
    headers; broken ones are skipped."""
    sides = []
    for number in evenly(len(images), most).tolist():
        with suppress(BrokenImage, OSError, ValueError), open_image(images.header_source(number)) as image:
            sides.append(min(image.size))
    return sides


def _has_16_bits(images: ImageSet, number: int) -> bool:
    try:
        return has_more_than_8_bits(images.header_source(number))
    except BrokenImage:
        return False


def narrow_range(used: tuple[int, int] | None, option: str) -> str:
    """The advice if 16-bit samples use less than an eighth of their range, else empty.

    used: their range, None if there are none.   option: the full name of value_range.
    """
    if used is None or used[1] - used[0] + 1 >= NARROW:
        return ""
    levels = used[1] // 256 - used[0] // 256 + 1
    return (
        f"the 16-bit samples lie between {used[0]} and {used[1]} of 0 to 65535, so {levels} of 256 gray levels are used: "
        f"give {option} data, percentiles, or two numbers such as [0, {2 ** used[1].bit_length() - 1}]"
    )
