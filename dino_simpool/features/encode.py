"""One feature vector for each image of a set, computed by all processes together.

Process r of W takes the images r, r + W, r + 2W, ... and its rows are put in place by image index. So nothing is padded or
counted twice, and the result depends neither on the batch size nor on the numbers of workers and processes (but for the
rounding of matrix products, and for min_over="batch", whose features depend on the batch by definition).

M images of the set, D width of a feature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dino_simpool import distributed
from dino_simpool.config import IMAGENET_MEAN, IMAGENET_STD, EvalConfig
from dino_simpool.data import ImageSet, index_loader
from dino_simpool.logs import progress
from dino_simpool.models.encoder import Encoder


@contextmanager
def evaluation_mode(encoder: nn.Module) -> Iterator[None]:
    """Put every module of the encoder in evaluation mode, and each back into its own mode afterwards."""
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def try_sizes(encoder: nn.Module, sizes: Sequence[int], *, device: torch.device) -> None:
    """One grey image of each size through the encoder in evaluation mode: a size that it cannot take is a ValueError now."""
    with evaluation_mode(encoder), torch.no_grad():
        for size in sizes:
            encoder(torch.zeros(1, 3, size, size, device=device))


def encode(encoder: Callable[[Tensor], Tensor], images: Tensor, *, device: torch.device, precision: str) -> Tensor:
    """What the encoder makes of images (B, 3, S, S), such as features (B, D): float32 on `device`, without gradient.

    encoder: itself, or one of its methods (tokens, attention). precision: fp32, or bf16 for its matrix products.
    """
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        features = encoder(images.to(device, non_blocking=True))
    return features.to(torch.float32, copy=True)  # a copy made out here is an ordinary tensor, that training may keep


def feature_batches(
    encoder: Callable[[Tensor], Tensor], images: ImageSet, indices: Sequence[int] | np.ndarray, *,
    transform: Callable[[Image.Image], Tensor], batch_size: int, workers: int | None, device: torch.device, precision: str,
    skip_broken: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """What the encoder makes of the images `indices`, in this order: (B, ...) float32 on the CPU, and (B,) int64 their indices.

    The i-th batch holds indices[i * batch_size : (i + 1) * batch_size]. encoder, precision: as in `encode`; its mode is left as
    it is. workers, skip_broken: as in `index_loader`.
    """
    loader = index_loader(
        images, transform, indices, batch_size=batch_size, workers=workers, device=device, skip_broken=skip_broken
    )
    for batch, index in loader:
        try:
            features = encode(encoder, batch, device=device, precision=precision).cpu()
        except ValueError as error:  # a size that the encoder cannot take
            raise ValueError(f"{images.name(int(index[0]))}: {error}") from error
        yield features, index


def extract_features(
    encoder: nn.Module,
    images: ImageSet,
    *,
    transform: Callable[[Image.Image], Tensor],
    batch_size: int,
    workers: int | None,
    device: torch.device,
    precision: str = "fp32",
    description: str = "features",
    broken: set[int] | None = None,
) -> Tensor:
    """Features (M, D) of all images, float32 on the CPU, on every process, in the order of the set.

    encoder: images (B, 3, S, S) -> (B, D), with D as its `embed_dim`; it is evaluated in evaluation mode and keeps its modes.
    batch_size: images in one forward pass of one process. workers: loader processes, None for the cores there are. precision:
    as in `encode`. broken: is given the numbers of the images that cannot be read, on every process, and their rows mean
    nothing; without it such an image is a BrokenImage. ValueError names the first image whose feature is not finite.
    """
    total, world = len(images), distributed.world_size()
    width: int = encoder.embed_dim  # type: ignore[assignment]
    indices = torch.arange(distributed.rank(), total, world)
    rows = torch.empty(len(indices), width)
    done, skipped = 0, set[int]()
    batches = feature_batches(
        encoder, images, indices.numpy(), transform=transform, batch_size=batch_size, workers=workers, device=device,
        precision=precision, skip_broken=broken is not None,
    )  # fmt: skip
    with evaluation_mode(encoder), progress(total, 0, description) as bar:
        for features, numbers in batches:
            skipped |= {~number for number in numbers.tolist() if number < 0}
            rows[done : done + len(features)] = features
            done += len(features)
            bar.update(min(world * len(features), total - bar.n))
    assert done == len(indices), f"the loader gave {done} of {len(indices)} images"
    features = distributed.gather_by_index(rows, indices, total)
    if broken is not None:
        broken.update(*distributed.gather_objects(skipped))
    damaged = torch.nonzero(~features.sum(1).isfinite())
    if len(damaged):
        raise ValueError(
            f"{len(damaged)} of {total} features are not finite, the first of {images.path(int(damaged[0]))}: "
            "check the weights and that image, and use precision fp32"
        )
    return features


def preprocessing(encoder: Encoder | None, cfg: EvalConfig) -> dict[str, Any]:
    """The settings of the evaluation transform, as its arguments: image_size, resize, mean, std.

    Size and normalisation belong to the encoder; cfg may ask for another size. resize: by default image_size * 256 / 224, cut
    to a whole number as published. ValueError if there is neither encoder nor size.
    """
    size = cfg.image_size or (encoder.config.image_size if encoder is not None else None)
    if size is None:
        raise ValueError("without a checkpoint the size of the images is unknown: give --image_size")
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if encoder is None else (encoder.config.mean, encoder.config.std)
    own = encoder.config.resize if encoder is not None and cfg.image_size is None else None
    return {"image_size": size, "resize": cfg.resize or own or size * 256 // 224, "mean": tuple(mean), "std": tuple(std)}
