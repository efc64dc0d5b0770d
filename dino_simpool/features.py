"""One feature vector for each image of a set, computed by all processes together.

Process r of W takes the images r, r + W, r + 2W, ... and its rows are put in place by image index. So nothing is padded or
counted twice, and the result depends neither on the batch size nor on the numbers of workers and processes (but for the
rounding of matrix products, and for min_over="batch", whose features depend on the batch by definition).

M images of the set, D width of a feature.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from dino_simpool import distributed
from dino_simpool.data import ImageSet, index_loader


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


def encode(encoder: nn.Module, images: Tensor, *, device: torch.device, precision: str) -> Tensor:
    """Features (B, D) in float32 on `device`, without gradient, of images (B, 3, S, S).

    precision: fp32, or bf16 for the matrix products of the encoder.
    """
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        features = encoder(images.to(device, non_blocking=True))
    return features.to(torch.float32, copy=True)  # a copy made out here is an ordinary tensor, that training may keep


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
) -> Tensor:
    """Features (M, D) of all images, float32 on the CPU, on every process, in the order of the set.

    encoder: images (B, 3, S, S) -> (B, D), with D as its `embed_dim`; it is evaluated in evaluation mode and keeps its modes.
    batch_size: images in one forward pass of one process. workers: loader processes, None for the cores there are. precision:
    as in `encode`. ValueError names the first image whose feature is not finite.
    """
    total, world = len(images), distributed.world_size()
    width: int = encoder.embed_dim  # type: ignore[assignment]
    indices = torch.arange(distributed.rank(), total, world)
    rows = torch.empty(len(indices), width)
    done = 0
    loader = index_loader(images, transform, indices.tolist(), batch_size=batch_size, workers=workers, device=device)
    with evaluation_mode(encoder), progress(total, description) as bar:
        for batch, _ in loader:
            rows[done : done + len(batch)] = encode(encoder, batch, device=device, precision=precision).cpu()
            done += len(batch)
            bar.update(min(world * len(batch), total - bar.n))
    assert done == len(indices), f"the loader gave {done} of {len(indices)} images"
    features = distributed.gather_by_index(rows, indices, total)
    damaged = torch.nonzero(~features.sum(1).isfinite())
    if len(damaged):
        raise ValueError(
            f"{len(damaged)} of {total} features are not finite, the first of {images.path(int(damaged[0]))}: "
            "check the weights and that image, and use precision fp32"
        )
    return features


def progress(total: int, description: str) -> tqdm[Any]:
    """A bar in images of all processes on the main one; in a file, a line every half minute and none before."""
    interval = 0.5 if sys.stderr.isatty() else 30.0
    return tqdm(
        total=total, desc=description, unit=" images", disable=not distributed.is_main(), delay=interval, mininterval=interval,
        maxinterval=interval, leave=False,
    )  # fmt: skip
