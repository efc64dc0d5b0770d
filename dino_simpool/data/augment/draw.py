"""The random numbers of the augmentation: a pure function of (seed, epoch, image, view).

The distributions are the published ones. One deviation: the numbers come from a counter-based
generator and not from the state of worker processes, so they do not depend on workers, processes,
or where the pixels are computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NARROWEST, WIDEST = 3 / 4, 4 / 3
"""Ratios of width to height of a crop."""
_LOG_RATIO = (math.log(NARROWEST), math.log(WIDEST))
CROP_TRIES = 10
CROP_NUMBERS = 2 * CROP_TRIES + 2
"""Uniform numbers per crop box: area and ratio for ten tries, then top and left."""
NUM_UNIFORMS = CROP_NUMBERS + 14
"""Uniform numbers per view: its box; whether to flip, jitter, convert to grayscale, blur and
solarize; four jitter factors; four sort keys for their order; the sigma of the blur."""
JITTER = ("brightness", "contrast", "saturation", "hue")
"""The operations of color jitter, in the numbering of ViewDraw.order and ViewDraw.factors."""

Box = tuple[int, int, int, int]
"""Top, left, height and width of a crop in pixels."""


def uniforms(seed: int, epoch: int, index: int, *, rows: int, columns: int) -> np.ndarray:
    """(rows, columns) float64 numbers in [0, 1), a pure function of seed, epoch and image index.

    Philox 4x64 with index and epoch in its counter. A row does not depend on how many rows follow.
    """
    philox = np.random.Philox(key=np.array([seed % 2**64, 0], np.uint64), counter=np.array([0, 0, index, epoch], np.uint64))
    bits = philox.random_raw(rows * columns)
    return ((bits >> np.uint64(11)) * 2.0**-53).reshape(rows, columns)


def crop_box(height: int, width: int, *, scale: tuple[float, float], numbers: Sequence[float]) -> Box:
    """The box of a crop of a height x width image, as in torchvision's RandomResizedCrop.

    scale: range of the area as a fraction of the image.   numbers: CROP_NUMBERS values in [0, 1).
    After ten tries that do not fit, the largest center crop with an allowed ratio is taken.
    """
    for area, ratio in zip(numbers[0 : 2 * CROP_TRIES : 2], numbers[1 : 2 * CROP_TRIES : 2], strict=True):
        pixels = height * width * (scale[0] + (scale[1] - scale[0]) * area)
        aspect = math.exp(_LOG_RATIO[0] + (_LOG_RATIO[1] - _LOG_RATIO[0]) * ratio)
        tall, wide = round(math.sqrt(pixels / aspect)), round(math.sqrt(pixels * aspect))
        if 0 < tall <= height and 0 < wide <= width:
            top, left = int(numbers[-2] * (height - tall + 1)), int(numbers[-1] * (width - wide + 1))
            return top, left, tall, wide
    tall, wide = min(height, round(width / NARROWEST)), min(width, round(height * WIDEST))
    return (height - tall) // 2, (width - wide) // 2, tall, wide


def blur_kernel(sigma: float) -> np.ndarray:
    """The 2 r + 1 weights of Pillow's Gaussian blur along one axis; sigma: in pixels, above 0.

    They come from three box filters of variance sigma^2 / 3 each. A box of radius l + a has 2 l + 1
    whole pixels and a fraction a of one more at each end (Gwosdek et al., Theoretical Foundations
    of Gaussian Convolution by Extended Box Filtering, 2011).
    """
    variance = sigma * sigma / 3
    whole = int((math.sqrt(12 * variance + 1) - 1) / 2)
    share = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    box = np.array([share] + [1.0] * (2 * whole + 1) + [share]) / (2 * (whole + share) + 1)
    return np.convolve(np.convolve(box, box), box)


@dataclass(frozen=True)
class ViewDraw:
    """The random numbers for the V views of one image; every array has one row per view."""

    box: np.ndarray
    """(V, 4) int64: top, left, height and width of the crop in pixels."""
    flip: np.ndarray
    jitter: np.ndarray
    grayscale: np.ndarray
    solarize: np.ndarray
    """These four: (V,) bool, whether it is applied."""
    factors: np.ndarray
    """(V, 4) float32: factors of brightness, contrast and saturation, and shift of hue in turns."""
    order: np.ndarray
    """(V, 4) int64: the order of these four operations; order[v, 0] is applied first."""
    sigma: np.ndarray
    """(V,) float32: standard deviation of the blur in pixels of the view; 0: no blur."""


@dataclass(frozen=True, kw_only=True)
class ViewRecipe:
    """The distributions: fields as in config.CropsConfig, triples for global 1, global 2, local."""

    global_size: int
    local_size: int
    num_local: int
    global_scale: tuple[float, float]
    local_scale: tuple[float, float]
    flip: float
    jitter: tuple[float, float, float, float]
    jitter_probability: float
    grayscale: float
    blur: tuple[float, float, float]
    blur_sigma: tuple[float, float]
    solarize: tuple[float, float, float]
    shrink_margin: float | None

    @property
    def sizes(self) -> list[int]:
        """The sides of the V views in pixels."""
        return [self.global_size] * 2 + [self.local_size] * self.num_local

    def draw(self, height: int, width: int, *, seed: int, epoch: int, index: int) -> ViewDraw:
        """All random numbers for the views of a height x width image."""
        numbers = uniforms(seed, epoch, index, rows=2 + self.num_local, columns=NUM_UNIFORMS)
        scales = [self.global_scale] * 2 + [self.local_scale] * self.num_local
        rows = numbers[:, :CROP_NUMBERS].tolist()  # crop_box is faster on plain numbers
        boxes = [crop_box(height, width, scale=scale, numbers=row) for scale, row in zip(scales, rows, strict=True)]
        flip, jitter, grayscale, blur, solarize = numbers[:, CROP_NUMBERS:-9].T
        kinds = [0, 1] + [2] * self.num_local
        low, high = self.blur_sigma
        sigma = np.where(blur < np.array(self.blur)[kinds], low + (high - low) * numbers[:, -1], 0)
        return ViewDraw(
            box=np.array(boxes),
            flip=flip < self.flip,
            jitter=jitter < self.jitter_probability,
            grayscale=grayscale < self.grayscale,
            solarize=solarize < np.array(self.solarize)[kinds],
            factors=((1, 1, 1, 0) + np.array(self.jitter) * (2 * numbers[:, -9:-5] - 1)).astype(np.float32),
            order=numbers[:, -5:-1].argsort(1, kind="stable"),
            sigma=sigma.astype(np.float32),
        )
