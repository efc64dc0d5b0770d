"""One feature vector for each image of a set, computed by all processes together.

Process r of W takes the images r, r + W, r + 2W, ..., and each row is put in place by the number of
its image. So nothing is padded or counted twice, and the result does not depend on the batch size,
the workers or the processes (except for the rounding of matrix products, and for min_over="batch",
whose features depend on the batch by definition).

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
from dino_simpool.config import IMAGENET_MEAN, IMAGENET_STD, ModelConfig
from dino_simpool.data import ImageSet, index_loader
from dino_simpool.logs import progress
from dino_simpool.models.encoder import Encoder


@contextmanager
def evaluation_mode(encoder: nn.Module) -> Iterator[None]:
    """Put every module of the encoder in evaluation mode, and afterwards back into its own mode."""
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def try_sizes(encoder: Encoder, sizes: Sequence[int], *, device: torch.device) -> None:
    """Pass one gray image of each size through the encoder in evaluation mode.

    ValueError for a size that it cannot take, or that a CNN turns into a map under 2 x 2: pooling such a map is a mistake.
    """
    with evaluation_mode(encoder), torch.no_grad():
        for size in sizes:
            x, grid = encoder.pool_input(torch.zeros(1, 3, size, size, device=device))
            encoder.pool(x)
            if not encoder.config.is_vit and min(grid) < 2:
                raise ValueError(
                    f"{encoder.config.arch} turns images of {size} x {size} pixels into a {grid[0]} x {grid[1]} map, "
                    "2 x 2 is the least: set model.stem small, fewer stages in model.depth, or larger images"
                )


def encode(encoder: Callable[[Tensor], Tensor], images: Tensor, *, device: torch.device, precision: str) -> Tensor:
    """The encoder's output for images (B, 3, S, S), such as features (B, D): float32 on `device`,
    without gradient.

    encoder: the module, or one of its methods (tokens, attention). precision: fp32, or bf16 for its
    matrix products.
    """
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        features = encoder(images.to(device, non_blocking=True))
    return features.to(torch.float32, copy=True)  # a copy made outside of inference mode can be used in training


def feature_batches(
    encoder: Callable[[Tensor], Tensor], images: ImageSet, indices: Sequence[int] | np.ndarray, *,
    transform: Callable[[Image.Image], Tensor], batch_size: int, workers: int | None, device: torch.device, precision: str,
    skip_broken: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """The encoder's output for the images `indices`, in this order: (B, ...) float32 on the CPU,
    and their numbers (B,) int64.

    The i-th batch holds indices[i * batch_size : (i + 1) * batch_size]. encoder, precision: as in
    `encode`; the encoder's mode is not changed. workers, skip_broken: as in `index_loader`.
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

    encoder: images (B, 3, S, S) -> (B, D), with D as its `embed_dim`; it runs in evaluation mode
    and keeps its modes. batch_size: images in one forward pass of one process. workers: loader
    processes, None for the number of cores. precision: as in `encode`. broken: a set that receives
    the numbers of broken images, on every process; their rows mean nothing. Without it, a broken
    image raises BrokenImage. ValueError names the first image whose feature is not finite.
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


def preprocessing(config: ModelConfig | None, *, image_size: int | None = None, resize: int | None = None) -> dict[str, Any]:
    """The arguments of the evaluation transform: image_size, resize, mean, std.

    Sizes and normalization are those of the model, unless another image_size or resize is asked
    for. For another image_size, resize is image_size * 256 / 224, rounded down as published.
    config: None without a model, then ImageNet's mean and std. ValueError if there is neither a
    model nor a size.
    """
    size = image_size or (config and config.image_size)
    if not size:
        raise ValueError("without a checkpoint the size of the images is unknown: give --image_size")
    own = config.resize if config and image_size is None else None
    mean, std = (config.mean, config.std) if config else (IMAGENET_MEAN, IMAGENET_STD)
    return {"image_size": size, "resize": resize or own or size * 256 // 224, "mean": tuple(mean), "std": tuple(std)}
