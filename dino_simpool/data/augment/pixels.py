"""The operations of the recipe on the pixels of one view on the CPU: (S, S, 3) uint8.

Each is the fastest among those measured in well-maintained libraries (`dino-simpool bench data`
times the whole): decoding by libjpeg-turbo (simplejpeg), resizing by torch's antialiased kernel for
uint8, colors and blur by OpenCV. They round to 8 bits after every operation, like the published
recipe on Pillow images. Largest difference from Pillow, in levels of 255 (tested):

    crop     1 on photographs, except 2 at single values in 3 % of the views (torch's weights have
             16 bits, Pillow's 22)
    colors   1 each: Pillow truncates fractions, OpenCV rounds
    hue      12: two steps of the 8-bit hue that both rotate. Pillow is up to 14 from float hues,
             this code up to 11
    blur     3 inside: one filter with Pillow's kernel, where Pillow rounds after each of six
             passes. 35 at the border, because Pillow extends the border pixels again after every
             pass. A sampled Gaussian, as in torchvision's tensor operation, would be a different
             blur: half as strong at sigma 0.5.
"""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np
import torch
from torch.nn import functional as F

from dino_simpool.data.augment.draw import Box, ViewDraw, blur_kernel

cv2.setNumThreads(1)  # views are small, and there is a loader process for each core

GRAY = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the gray level (ITU-R 601, as in Pillow and torchvision)."""
_SAME, _TO_GRAY = np.eye(3), np.array([GRAY] * 3)


def resized_crop(pixels: np.ndarray, box: Box, size: int) -> np.ndarray:
    """Crop and resize pixels (H, W, 3) uint8 to (size, size, 3), bicubic, like Pillow."""
    top, left, height, width = box
    crop = pixels[top : top + height, left : left + width]
    # Both passes round and clip to 8 bits, so their order matters. This is that of Pillow 13.
    down_first = height > size and height - size > 2 * (width - size)
    crop = cv2.transpose(crop) if down_first else crop.copy()
    image = torch.from_numpy(crop)[None].permute(0, 3, 1, 2)  # recognized as channels last, like the result
    resized = F.interpolate(image, (size, size), mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()
    return cv2.transpose(resized) if down_first else np.ascontiguousarray(resized)


def adjust_brightness(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Mix with black. Factor 0 is black, 1 is the image itself."""
    return cv2.convertScaleAbs(pixels, alpha=factor)


def adjust_contrast(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Mix with the rounded mean gray level. Factor 0 is uniform gray, 1 is the image itself."""
    level = int(sum(weight * mean for weight, mean in zip(GRAY, cv2.mean(pixels), strict=False)) + 0.5)
    return cv2.addWeighted(pixels, factor, pixels, 0.0, (1 - factor) * level)


def adjust_saturation(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Mix with the grayscale image. Factor 0 is grayscale, 1 is the image itself."""
    return cv2.transform(pixels, factor * _SAME + (1 - factor) * _TO_GRAY)


def adjust_hue(pixels: np.ndarray, shift: float) -> np.ndarray:
    """Rotate the hue by `shift` turns (-0.5 to 0.5), in 8-bit HSV as in torchvision."""
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL)
    rows = hsv.reshape(len(hsv), -1)  # adding to whole rows is twice as fast as to every third value
    rows += _first_of_three(hsv.shape[1]) * np.uint8(int(shift * 255) % 256)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


@lru_cache
def _first_of_three(width: int) -> np.ndarray:
    return np.tile(np.array([1, 0, 0], np.uint8), width)


ADJUST = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
"""In the order of draw.JITTER."""


def gaussian_blur(pixels: np.ndarray, sigma: float) -> np.ndarray:
    """Filter with `blur_kernel` along both axes; border pixels are replicated."""
    kernel = blur_kernel(sigma).astype(np.float32)  # floats are three times as fast as OpenCV's 8-bit filter
    return cv2.convertScaleAbs(cv2.sepFilter2D(pixels, cv2.CV_32F, kernel, kernel, borderType=cv2.BORDER_REPLICATE))


def solarize(pixels: np.ndarray) -> np.ndarray:
    """Invert values of 128 and above."""
    bright = pixels.view(np.int8) >> 7  # 0, or all bits set
    return pixels ^ bright.view(np.uint8)


def apply_colors(pixels: np.ndarray, draw: ViewDraw, view: int) -> np.ndarray:
    """Flip, jitter, grayscale, blur and solarize the pixels (S, S, 3) uint8 of one view."""
    if draw.flip[view]:
        pixels = cv2.flip(pixels, 1, dst=pixels)
    if draw.jitter[view]:
        factors = draw.factors[view].tolist()
        for operation in draw.order[view].tolist():
            pixels = ADJUST[operation](pixels, factors[operation])
    if draw.grayscale[view]:
        pixels = adjust_saturation(pixels, 0.0)
    if draw.sigma[view]:
        pixels = gaussian_blur(pixels, float(draw.sigma[view]))
    return solarize(pixels) if draw.solarize[view] else pixels
