"""Multi-crop augmentation: two global views and several local views of one image.

The published recipe of DINO and SimPool (facebookresearch/dino and billpsomas/simpool,
main_dino.py). Each view in this order: random resized crop (bicubic), horizontal flip, color jitter
in random order, grayscale, Gaussian blur, solarize, normalize. All random numbers are drawn first
(draw.py). The pixels are computed from them in one of two places:

    CPU      loaders make complete views (pixels.py), and the training device only normalizes them
    device   loaders decode, crop and resize, and the device does the rest on batches (batch.py)

Both transfer 8-bit views, a quarter of the bytes. An image is decoded once for all its views.
Letters: V views (global 1, global 2, then local ones), B images, S side of a view in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dino_simpool.data.augment import batch
from dino_simpool.data.augment.draw import CROP_NUMBERS, ViewDraw, ViewRecipe, blur_kernel, crop_box, uniforms
from dino_simpool.data.augment.pixels import apply_colors, resized_crop
from dino_simpool.data.decode import EncodedImage


@dataclass(frozen=True, kw_only=True)
class MultiCrop(ViewRecipe):
    """The multi-crop recipe: an image file in, V views out, global views first."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    on_device: bool = False
    """Flips, colors and blur are left to `finish`."""

    def __call__(self, file: EncodedImage, *, seed: int, epoch: int, index: int) -> list[Tensor]:
        """V views (S, S, 3) uint8 of an image file, for `finish`. BrokenImage if it is broken.

        The randomness depends only on seed, epoch and index (of the image in its set). With
        `on_device` the views have their original colors, and a tensor of parameters comes last.
        """
        if file.jpeg_size is None:
            pixels = file.pixels()
            return self.views(pixels, self.draw(*pixels.shape[:2], seed=seed, epoch=epoch, index=index))
        draw = self.draw(*file.jpeg_size, seed=seed, epoch=epoch, index=index)
        shrink = self.shrink(draw)
        return self.views(file.pixels(shrink=shrink), draw, shrink=shrink)

    def views(self, pixels: np.ndarray, draw: ViewDraw, *, shrink: int = 1) -> list[Tensor]:
        """`__call__` for decoded pixels (H, W, 3) uint8, shrunk by `shrink`."""
        boxes = [shrunk(box, shrink) for box in draw.box.tolist()]
        crops = [resized_crop(pixels, box, size) for box, size in zip(boxes, self.sizes, strict=True)]
        if self.on_device:
            return [*map(torch.from_numpy, crops), batch.pack(draw, radius=self.blur_radius)]
        return [torch.from_numpy(apply_colors(crop, draw, view)) for view, crop in enumerate(crops)]

    def finish(self, parts: Sequence[Tensor], *, dtype: torch.dtype = torch.float32, compiled: bool = False) -> list[Tensor]:
        """Collated outputs of `__call__` -> V tensors (B, 3, S, S), channels last, same device.

        compiled: fuse the operations with torch.compile; the first calls take a minute.
        """
        apply = batch.compiled_colors() if compiled else batch.apply_colors
        done: list[Tensor] = []
        for first, last in ((0, 2), (2, 2 + self.num_local)):  # views of one size together
            if first < last:
                x = torch.cat(list(parts[first:last]))
                if self.on_device:
                    parameters = parts[-1][:, first:last].transpose(0, 1).flatten(0, 1)
                    x = apply(x.permute(0, 3, 1, 2), parameters).permute(0, 2, 3, 1).contiguous()
                x = batch.normalize(x, mean=self.mean, std=self.std, dtype=dtype)
                done += x.permute(0, 3, 1, 2).chunk(last - first)
        return done

    def shrink(self, draw: ViewDraw) -> int:
        """The factor to shrink a JPEG by: crops keep `shrink_margin` times their view's side."""
        if self.shrink_margin is not None:
            for factor in (8, 4, 2):  # what a JPEG decoder can do
                needed = (factor * self.shrink_margin * size for size in self.sizes)
                if all(min(box[2:]) >= side for box, side in zip(draw.box.tolist(), needed, strict=True)):
                    return factor
        return 1

    @cached_property
    def blur_radius(self) -> int:
        """Radius of the widest blur in pixels."""
        return len(blur_kernel(self.blur_sigma[1])) // 2 if self.blur_sigma[1] else 0


def shrunk(box: Sequence[int], shrink: int) -> tuple[int, int, int, int]:
    """A box (top, left, height, width) in the pixels of a shrunk image, rounded at each edge.

    Apart from this rounding, views of 12-megapixel photographs differ by 0.2 of 255 levels on
    average (0.5 in the worst view, 10 at most) with the default margin of 2, and by 0.5 (1.5, 17)
    with a margin of 1.
    """
    top, left, height, width = box
    above, before, below, behind = (round(edge / shrink) for edge in (top, left, top + height, left + width))
    return above, before, below - above, behind - before


def to_tensor(images: Sequence[Image.Image], *, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(n, 3, H, W) float32 of n RGB images of one size: in 0..1, minus mean, divided by std."""
    width, height = images[0].size
    pixels = np.frombuffer(b"".join(image.tobytes() for image in images), np.uint8).reshape(len(images), height, width, 3)
    planes = pixels.transpose(0, 3, 1, 2).astype(np.float32, order="C")
    planes -= 255 * np.array(mean, np.float32)[:, None, None]
    planes *= 1 / (255 * np.array(std, np.float32)[:, None, None])
    return torch.from_numpy(planes)
