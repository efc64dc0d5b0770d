"""Multi-crop augmentation: two global and some local views of one image, drawn first and applied afterwards.

The published recipe of DINO and SimPool (facebookresearch/dino and billpsomas/simpool, main_dino.py), on the CPU with Pillow,
view by view in this order: random resized crop (bicubic), horizontal flip, colour jitter in random order, grey, Gaussian blur,
solarise, normalise. `MultiCrop.draw` makes every random number of an image, `apply_view` uses them, so that another
implementation can apply the same draw. What deviates: the random numbers are a pure function of (seed, epoch, image, view) by a
counter-based generator, and do not follow from worker processes.

Letters: V views (global 1, global 2, then local ones), S side of a view in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import Image, ImageChops, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

CROP_RATIO = (3 / 4, 4 / 3)
# Uniform numbers of one view, by column: area and ratio of ten crop tries, top and left; whether to flip, jitter, turn grey,
# blur and solarise; four jitter factors; four sort keys for their order; the blur's sigma.
_BOX, _CHANCES, _FACTORS, _ORDER, _SIGMA = slice(0, 22), slice(22, 27), slice(27, 31), slice(31, 35), 35
NUM_UNIFORMS = 36


def uniforms(seed: int, epoch: int, index: int, *, rows: int, columns: int) -> np.ndarray:
    """(rows, columns) float64 numbers in [0, 1), a pure function of seed, epoch and image index (Philox 4x64, the index and
    the epoch in its counter). Row r does not depend on how many rows follow."""
    philox = np.random.Philox(key=np.array([seed % 2**64, 0], np.uint64), counter=np.array([0, 0, index, epoch], np.uint64))
    bits = philox.random_raw(rows * columns)
    return ((bits >> np.uint64(11)) * 2.0**-53).reshape(rows, columns)


def crop_boxes(height: int, width: int, *, low: np.ndarray, high: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Boxes of random resized crops as in torchvision's RandomResizedCrop: ten tries, then the largest centre crop.

    low, high: (V,) range of the area as a share of the image.
    numbers: (V, 22) in [0, 1): area and ratio of ten tries, then top and left.
    Returns (V, 4) int64: top, left, height, width in pixels, inside the image.
    """
    ratio_low, ratio_high = math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])
    tries, place = numbers[:, :-2].reshape(len(numbers), -1, 2), numbers[:, -2:]
    area = height * width * (low[:, None] + (high - low)[:, None] * tries[..., 0])
    ratio = np.exp(ratio_low + (ratio_high - ratio_low) * tries[..., 1])
    sizes = np.rint(np.sqrt(np.stack([area / ratio, area * ratio], -1))).astype(np.int64)
    valid = ((sizes > 0) & (sizes <= (height, width))).all(-1)
    size = np.take_along_axis(sizes, valid.argmax(1)[:, None, None], 1)[:, 0]
    free = np.array([height, width]) - size
    corner = np.floor(place * (free + 1)).astype(np.int64)
    failed = ~valid.any(1)
    if failed.any():
        size[failed] = _centre_size(height, width)
        corner[failed] = (np.array([height, width]) - size[failed]) // 2
    return np.concatenate([corner, size], 1)


def _centre_size(height: int, width: int) -> tuple[int, int]:
    """Height and width of the largest centre crop whose ratio is allowed (a long thin image), or of the whole image."""
    if width / height < CROP_RATIO[0]:
        return round(width / CROP_RATIO[0]), width
    if width / height > CROP_RATIO[1]:
        return height, round(height * CROP_RATIO[1])
    return height, width


@dataclass(frozen=True)
class ViewDraw:
    """What was drawn for the V views of one image; every array has one row per view."""

    box: np.ndarray
    """(V, 4) int64: top, left, height and width of the crop in pixels."""
    flip: np.ndarray
    """(V,) bool."""
    jitter: np.ndarray
    """(V,) bool: whether the colour jitter is applied."""
    factors: np.ndarray
    """(V, 4) float64: factor of brightness, contrast and saturation (1 changes nothing) and shift of hue (in turns)."""
    order: np.ndarray
    """(V, 4) int64: the order of these four; order[v, 0] is applied first."""
    grayscale: np.ndarray
    """(V,) bool."""
    sigma: np.ndarray
    """(V,) float64: standard deviation of the blur in pixels of the view; 0 for no blur."""
    solarize: np.ndarray
    """(V,) bool."""


@dataclass(frozen=True, kw_only=True)
class MultiCrop:
    """The multi-crop recipe: a PIL image in, V normalised float32 tensors (3, S, S) out, global views first.

    Fields are those of config.CropsConfig (same meaning, same order of triples: global 1, global 2, local) and the
    normalisation of config.ModelConfig.
    """

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
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, image: Image.Image, *, seed: int, epoch: int, index: int) -> list[Tensor]:
        """V tensors (3, S, S) of an RGB image; seed, epoch and index (of the image in its set) alone decide the randomness."""
        draw = self.draw(image.height, image.width, seed=seed, epoch=epoch, index=index)
        sizes = self.sizes
        views = [apply_view(image, draw, view, size=size) for view, size in enumerate(sizes)]
        # One conversion for all views of a size: at 32 px the calls cost more than the pixels.
        return [x for part in (views[:2], views[2:]) if part for x in to_tensor(part, mean=self.mean, std=self.std)]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The side of each of the V views in pixels."""
        return (self.global_size,) * 2 + (self.local_size,) * self.num_local

    def draw(self, height: int, width: int, *, seed: int, epoch: int, index: int) -> ViewDraw:
        """All random numbers for the views of an image of height x width pixels."""
        numbers = uniforms(seed, epoch, index, rows=2 + self.num_local, columns=NUM_UNIFORMS)
        scale, chances = self._by_view
        flip, jitter, grayscale, blur, solarize = (numbers[:, _CHANCES] < chances).T
        sigma_low, sigma_high = self.blur_sigma
        return ViewDraw(
            box=crop_boxes(height, width, low=scale[:, 0], high=scale[:, 1], numbers=numbers[:, _BOX]),
            flip=flip,
            jitter=jitter,
            factors=(1, 1, 1, 0) + np.array(self.jitter) * (2 * numbers[:, _FACTORS] - 1),
            order=np.argsort(numbers[:, _ORDER], axis=1),
            grayscale=grayscale,
            sigma=blur * (sigma_low + (sigma_high - sigma_low) * numbers[:, _SIGMA]),
            solarize=solarize,
        )

    @cached_property
    def _by_view(self) -> tuple[np.ndarray, np.ndarray]:
        """(V, 2) scale range and (V, 5) probability of flip, jitter, grey, blur and solarise."""
        kinds = [0, 1] + [2] * self.num_local
        scale = np.array([self.global_scale, self.global_scale, self.local_scale])
        chances = np.array(
            [(self.flip, self.jitter_probability, self.grayscale, self.blur[kind], self.solarize[kind]) for kind in range(3)]
        )
        return scale[kinds], chances[kinds]


def apply_view(image: Image.Image, draw: ViewDraw, view: int, *, size: int) -> Image.Image:
    """One view of an RGB image: crop, flip, jitter, grey, blur and solarise as drawn; RGB of size x size pixels."""
    top, left, height, width = draw.box[view].tolist()
    # Cropping before resizing keeps the filter inside the crop, as published; resize(box=...) would let it look around.
    image = image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BICUBIC)
    if draw.flip[view]:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if draw.jitter[view]:
        factors = draw.factors[view].tolist()
        for operation in draw.order[view].tolist():
            image = JITTER[operation](image, factors[operation])
    if draw.grayscale[view]:
        image = image.convert("L").convert("RGB")
    if draw.sigma[view]:
        image = image.filter(ImageFilter.GaussianBlur(float(draw.sigma[view])))
    return ImageOps.solarize(image, 128) if draw.solarize[view] else image


def adjust_brightness(image: Image.Image, factor: float) -> Image.Image:
    """Mix with black: factor 0 is black, 1 the image itself."""
    return ImageEnhance.Brightness(image).enhance(factor)


def adjust_contrast(image: Image.Image, factor: float) -> Image.Image:
    """Mix with the mean grey level, rounded: factor 0 is plain grey, 1 the image itself."""
    # The numbers of ImageEnhance.Contrast at half its overhead, which at 32 px is all there is.
    level = int(float(np.asarray(image.convert("L")).mean()) + 0.5)
    return Image.blend(Image.new("RGB", image.size, (level, level, level)), image, factor)


def adjust_saturation(image: Image.Image, factor: float) -> Image.Image:
    """Mix with the grey image: factor 0 is grey, 1 the image itself."""
    return Image.blend(image.convert("L").convert("RGB"), image, factor)


def adjust_hue(image: Image.Image, shift: float) -> Image.Image:
    """Turn the hue by `shift` turns (-0.5 to 0.5), in 8-bit HSV as torchvision does on PIL images."""
    turn = Image.new("HSV", image.size, (int(shift * 255) % 256, 0, 0))
    return ImageChops.add_modulo(image.convert("HSV"), turn).convert("RGB")


JITTER = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
"""The four operations of the colour jitter; ViewDraw.order and .factors count them in this order."""


def to_tensor(images: Sequence[Image.Image], *, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(n, 3, H, W) float32 of n RGB images of one size: divided by 255, less the mean, divided by the standard deviation."""
    width, height = images[0].size
    pixels = np.frombuffer(b"".join(image.tobytes() for image in images), np.uint8).reshape(len(images), height, width, 3)
    planes = pixels.transpose(0, 3, 1, 2).astype(np.float32, order="C")
    planes -= 255 * np.array(mean, np.float32)[:, None, None]
    planes *= 1 / (255 * np.array(std, np.float32)[:, None, None])
    return torch.from_numpy(planes)
