"""One feature vector for each image of a set, computed by all processes together.

Process r of W takes the images r, r + W, r + 2W, ..., and each row is put in place by the number of
its image. So nothing is padded or counted twice, and the result does not depend on the batch size,
the workers or the processes (except for the rounding of matrix products, and for min_over="batch",
whose features depend on the batch by definition).

Everywhere, an encoder runs on the device that it is on, in evaluation mode, and keeps its modes.

M images of the set, D width of a feature.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dino_simpool import distributed
from dino_simpool.config import DEFAULT_DECODING, IMAGENET_MEAN, IMAGENET_STD, DecodingSettings, ModelConfig, PixelValues
from dino_simpool.data import ImageSet, index_loader
from dino_simpool.data.value_range import with_range_of
from dino_simpool.logs import progress
from dino_simpool.models.encoder import Encoder


@dataclass(frozen=True)
class Forward:
    """How images go through an encoder."""

    transform: Callable[[Image.Image], Any]
    """Makes the normalized image (3, H, W)."""
    batch_size: int
    """Images in one forward pass of one process."""
    workers: int | None
    """Loader processes. None: the number of cores."""
    precision: str = "fp32"
    """fp32, or bf16 for the encoder's matrix products."""

    def batches(
        self,
        images: ImageSet,
        order: Sequence[int] | np.ndarray,
        device: torch.device,
        *,
        skip_broken: bool = False,
        with_keys: bool = False,
    ) -> DataLoader:
        """The `index_loader` of these images, in this order."""
        load = partial(index_loader, images, self.transform, order, batch_size=self.batch_size, workers=self.workers)
        return load(device=device, skip_broken=skip_broken, with_keys=with_keys)


@contextmanager
def evaluation_mode(encoder: nn.Module) -> Iterator[None]:
    """Put every module of the encoder in evaluation mode, and afterwards back into its own mode."""
    training = [module for module in encoder.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def decoding_of(cfg: PixelValues, encoder: Encoder | None, images: ImageSet) -> DecodingSettings:
    """How image sets are decoded for an encoder: as in its training, unless cfg says otherwise.

    images: those whose range the value range `data` is.
    """
    trained = DEFAULT_DECODING if encoder is None else encoder.decoding
    turned = getattr(cfg, "exif_orientation", None)
    decoding = DecodingSettings(
        max_pixels=cfg.max_pixels,
        exif_orientation=trained.exif_orientation if turned is None else turned,
        extra_band=cfg.extra_band or trained.extra_band,
        transparency=cfg.transparency or trained.transparency,
        value_range=cfg.value_range or trained.value_range,
    )
    return with_range_of(images, decoding)


def device_of(encoder: nn.Module) -> torch.device:
    """The device of an encoder."""
    return next(itertools.chain(encoder.parameters(), encoder.buffers())).device


def try_sizes(encoder: Encoder, sizes: Sequence[int]) -> None:
    """Pass one gray image of each size through the encoder.

    ValueError for a size that it cannot take, or that a CNN turns into a map under 2 x 2: pooling
    such a map is a mistake.
    """
    with evaluation_mode(encoder), torch.no_grad():
        for size in sizes:
            x, grid = encoder.pool_input(torch.zeros(1, 3, size, size, device=device_of(encoder)))
            encoder.pool(x)
            if not encoder.config.is_vit and min(grid) < 2:
                raise ValueError(
                    f"{encoder.config.arch} turns images of {size} x {size} pixels into a {grid[0]} x {grid[1]} map, "
                    "2 x 2 is the least: set model.stem small, fewer stages in model.depth, or larger images"
                )


def encode(encoder: nn.Module, images: Tensor, *, precision: str, method: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """The output of the encoder, or of one of its methods, for images (B, 3, S, S): float32 on its
    device, without gradient."""
    device = device_of(encoder)
    with evaluation_mode(encoder), torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, precision == "bf16"):
        features = (method or encoder)(images.to(device, non_blocking=True))
    return features.to(torch.float32, copy=True)  # a copy made outside of inference mode can be used in training


def extract_features(
    encoder: nn.Module,
    images: ImageSet,
    forward: Forward,
    *,
    description: str = "features",
    broken: set[int] | None = None,
    keys: Tensor | None = None,
) -> Tensor:
    """Features (M, D) of all images, float32 on the CPU, on every process, in the order of the set.

    encoder: images (B, 3, S, S) -> (B, D), with D as its `embed_dim`. broken: a set that receives
    the numbers of broken images, on every process; their rows mean nothing. Without it, a broken
    image raises BrokenImage. keys: (M,) int64, which receives the `file_key` of each image, on
    every process. ValueError names the first image whose feature is not finite.
    """
    total, world = len(images), distributed.world_size()
    width: int = encoder.embed_dim  # type: ignore[assignment]
    indices = torch.arange(distributed.rank(), total, world)
    rows, own_keys = torch.empty(len(indices), width), torch.empty(len(indices), dtype=torch.int64)
    done, skipped = 0, set[int]()
    asked = {"skip_broken": broken is not None, "with_keys": keys is not None}
    with progress(total, 0, description) as bar:
        for batch, numbers, *read in forward.batches(images, indices.numpy(), device_of(encoder), **asked):
            if read:
                own_keys[done : done + len(batch)] = read[0]
            skipped |= {~number for number in numbers.tolist() if number < 0}
            try:
                rows[done : done + len(batch)] = encode(encoder, batch, precision=forward.precision).cpu()
            except ValueError as error:  # a size that the encoder cannot take
                raise ValueError(f"{images.name(int(numbers[0]))}: {error}") from error
            done += len(batch)
            bar.update(min(world * len(batch), total - bar.n))
    assert done == len(indices), f"the loader gave {done} of {len(indices)} images"
    features = distributed.gather_by_index(rows, indices, total)
    if keys is not None:
        keys.copy_(distributed.gather_by_index(own_keys, indices, total))
    if broken is not None:
        broken.update(*distributed.gather_objects(skipped))
    if len(not_finite := torch.nonzero(~features.sum(1).isfinite())):
        raise ValueError(
            f"{len(not_finite)} of {total} features are not finite, the first of {images.path(int(not_finite[0]))}: "
            "check the weights and that image, and use precision fp32"
        )
    return features


def preprocessing(config: ModelConfig | None, *, image_size: int | None = None, resize: int | None = None) -> dict[str, Any]:
    """The arguments of the evaluation transform: image_size, resize, mean, std.

    Sizes and normalization are those of the model, unless another image_size or resize is given.
    For another image_size, resize is image_size * 256 / 224, rounded down as published. Without a
    model, mean and std are ImageNet's, and ValueError without a size.
    """
    size = image_size or (config and config.image_size)
    if not size:
        raise ValueError("without a checkpoint the size of the images is unknown: give --image_size")
    own = config.resize if config and image_size is None else None
    mean, std = (config.mean, config.std) if config else (IMAGENET_MEAN, IMAGENET_STD)
    return {"image_size": size, "resize": resize or own or size * 256 // 224, "mean": tuple(mean), "std": tuple(std)}
