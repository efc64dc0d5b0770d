"""Multi-crop augmentation: two global views and several local views of one image.

The published recipe of DINO and SimPool (facebookresearch/dino and billpsomas/simpool,
main_dino.py). Each view in this order: random resized crop (bicubic), horizontal flip, color jitter
in random order, grayscale, Gaussian blur, solarize, normalize. All random numbers are drawn first.
The pixels are computed in one of two places, from the same random numbers:

    CPU      loaders make complete views, and the training device only normalizes them
    device   loaders decode, crop and resize, and the device does the rest on batches (for GPUs)

Both transfer 8-bit views, a quarter of the bytes. An image is decoded once for all its views.

    draw.py     the random numbers
    pixels.py   the operations on one image on the CPU
    batch.py    the operations on many views on the device

Letters: V views (global 1, global 2, then local ones), B images, S side of a view in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dino_simpool.data.augment import batch
from dino_simpool.data.augment.draw import CROP_NUMBERS, ViewDraw, ViewKind, blur_kernel, crop_box, draw_views, uniforms
from dino_simpool.data.augment.pixels import apply_colors, resized_crop
from dino_simpool.data.decode import EncodedImage

__all__ = ["CROP_NUMBERS", "MultiCrop", "ViewDraw", "crop_box", "to_tensor", "uniforms"]

SHRINKS = (8, 4, 2)
"""Factors by which a JPEG decoder can shrink an image."""


@dataclass(frozen=True, kw_only=True)
class MultiCrop:
    """The multi-crop recipe: an image file in, V views out, global views first.

    The fields are those of config.CropsConfig (same meaning, triples in the order global 1, global
    2, local), mean and std of config.ModelConfig, and where the color operations are done.
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
    shrink_margin: float | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    on_device: bool = False

    def __call__(self, file: EncodedImage, *, seed: int, epoch: int, index: int) -> list[Tensor]:
        """V views (S, S, 3) uint8 of an image file, for `finish`.

        The randomness depends only on seed, epoch and index (of the image in its set). With
        `on_device` the views are not flipped and have their original colors, and a tensor of their
        parameters comes last. BrokenImage if the file cannot be decoded.
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
        crops = [resized_crop(pixels, box, kind.size) for box, kind in zip(boxes, self.kinds, strict=True)]
        if self.on_device:
            return [*map(torch.from_numpy, crops), batch.pack(draw, radius=self.blur_radius)]
        return [torch.from_numpy(apply_colors(crop, draw, view)) for view, crop in enumerate(crops)]

    def finish(self, parts: Sequence[Tensor], *, dtype: torch.dtype = torch.float32, compiled: bool = False) -> list[Tensor]:
        """Collated outputs of `__call__` -> V tensors (B, 3, S, S) for the encoder, channels last.

        They stay on their device.   compiled: fuse the operations with torch.compile; the first
        calls take a minute.
        """
        views = len(self.kinds)
        apply = batch.compiled_colors() if compiled else batch.apply_colors
        done: list[Tensor] = []
        for first, last in ((0, 2), (2, views)):  # views of one size together
            if first < last:
                x = torch.cat(list(parts[first:last]))
                if self.on_device:
                    parameters = parts[views][:, first:last].transpose(0, 1).flatten(0, 1)
                    x = apply(x.permute(0, 3, 1, 2), parameters).permute(0, 2, 3, 1).contiguous()
                x = batch.normalize(x, mean=self.mean, std=self.std, dtype=dtype)
                done += x.permute(0, 3, 1, 2).chunk(last - first)
        return done

    def draw(self, height: int, width: int, *, seed: int, epoch: int, index: int) -> ViewDraw:
        """All random numbers for the views of an image with height x width pixels."""
        return draw_views(self.kinds, height, width, seed=seed, epoch=epoch, index=index)

    def shrink(self, draw: ViewDraw) -> int:
        """The factor to shrink a JPEG by: crops keep `shrink_margin` times their view's side."""
        if self.shrink_margin is not None:
            for factor in SHRINKS:
                needed = (factor * self.shrink_margin * kind.size for kind in self.kinds)
                if all(min(box[2:]) >= side for box, side in zip(draw.box.tolist(), needed, strict=True)):
                    return factor
        return 1

    @cached_property
    def kinds(self) -> tuple[ViewKind, ...]:
        """The distribution of each of the V views."""
        common = partial(
            ViewKind,
            flip=self.flip,
            jitter=self.jitter,
            jitter_probability=self.jitter_probability,
            grayscale=self.grayscale,
            blur_sigma=self.blur_sigma,
        )
        globals_ = [
            common(size=self.global_size, scale=self.global_scale, blur=self.blur[i], solarize=self.solarize[i]) for i in (0, 1)
        ]
        local = common(size=self.local_size, scale=self.local_scale, blur=self.blur[2], solarize=self.solarize[2])
        return (*globals_, *[local] * self.num_local)

    @cached_property
    def blur_radius(self) -> int:
        """Radius of the widest blur in pixels."""
        return len(blur_kernel(self.blur_sigma[1])) // 2 if self.blur_sigma[1] else 0


def shrunk(box: Sequence[int], shrink: int) -> tuple[int, int, int, int]:
    """A box (top, left, height, width) in the pixels of a shrunk image, rounded at each edge.

    An edge moves by at most half a pixel of that image. Apart from that, views of 12-megapixel
    photographs differ by 0.2 of 255 levels on average (0.5 in the worst view, 10 at most) with the
    default margin of 2, and by 0.5 (1.5, 17) with a margin of 1.
    """
    top, left, height, width = box
    (above, below), (before, behind) = (
        (round(start / shrink), round((start + length) / shrink)) for start, length in ((top, height), (left, width))
    )
    return above, before, below - above, behind - before


def to_tensor(images: Sequence[Image.Image], *, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(n, 3, H, W) float32 of n RGB images of one size: in 0..1, minus mean, divided by std."""
    width, height = images[0].size
    pixels = np.frombuffer(b"".join(image.tobytes() for image in images), np.uint8).reshape(len(images), height, width, 3)
    planes = pixels.transpose(0, 3, 1, 2).astype(np.float32, order="C")
    planes -= 255 * np.array(mean, np.float32)[:, None, None]
    planes *= 1 / (255 * np.array(std, np.float32)[:, None, None])
    return torch.from_numpy(planes)
