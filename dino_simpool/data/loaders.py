"""From paths to batches: the evaluation transform, the order of the training images, and the loaders with their processes.

Letters: B images, V views, S side of a view in pixels, M dataset size.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dino_simpool import distributed
from dino_simpool.data.augment import to_tensor
from dino_simpool.data.decode import BrokenImage, EncodedImage
from dino_simpool.data.replace import read_or_replace
from dino_simpool.data.sources import ImageSet

PREFETCH = 4
"""Batches that each loader process has ready: an image that takes long stops nobody."""
LONGEST = 64
"""So many times its shorter side EvalTransform keeps of an image: what is farther from the centre crop would cost gigabytes."""


@dataclass(frozen=True)
class EvalTransform:
    """The published evaluation transform: shorter side to `resize` (bicubic by default, Pillow), centre crop, normalise."""

    image_size: int
    """Side S of the square that comes out, in pixels."""
    _: KW_ONLY
    resize: int | None
    """Shorter side before the crop. None: image_size * 256 / 224, as published."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"

    def __post_init__(self) -> None:
        if self.resize is not None and self.resize < self.image_size:
            raise ValueError(f"resize is {self.resize}: a centre crop of {self.image_size} needs {self.image_size} or more")

    def __call__(self, image: Image.Image) -> Tensor:
        """(3, S, S) float32 of an RGB image."""
        short = self.resize or self.image_size * 256 // 224
        shorter = min(image.size)
        if max(image.size) > LONGEST * shorter:
            sides = [min(side, LONGEST * shorter + side % 2) for side in image.size]  # even or odd as before: same centre
            left, top = ((side - kept) // 2 for side, kept in zip(image.size, sides, strict=True))
            image = image.crop((left, top, left + sides[0], top + sides[1]))
        method = Image.Resampling[self.interpolation.upper()]
        image = image.resize((short * image.width // shorter, short * image.height // shorter), method)
        left, top = round((image.width - self.image_size) / 2), round((image.height - self.image_size) / 2)
        image = image.crop((left, top, left + self.image_size, top + self.image_size))
        return to_tensor([image], mean=self.mean, std=self.std)[0]


class Augmentation(Protocol):
    """An image file to some tensors, a pure function of its arguments; augment.MultiCrop is one."""

    def __call__(self, file: EncodedImage, *, seed: int, epoch: int, index: int) -> list[Tensor]: ...


@dataclass(frozen=True, eq=False)
class TransformedImages(Dataset[tuple[Any, int]]):
    """(transformed image, index) by index. With `skip_broken`, of an image that cannot be read (a black one, ~index)."""

    images: ImageSet
    transform: Callable[[Image.Image], Any]
    skip_broken: bool = False

    def __getitem__(self, index: int) -> tuple[Any, int]:
        try:
            return self.transform(self.images.read(index)), index
        except BrokenImage:
            if not self.skip_broken:
                raise
            return self.transform(Image.new("RGB", (LONGEST, LONGEST))), ~index


@dataclass(frozen=True, eq=False)
class MultiCropDataset(Dataset[tuple[list[Tensor], int]]):
    """(tensors of the augmentation, index) by (epoch, index)."""

    images: ImageSet
    augment: Augmentation
    seed: int

    def __getitem__(self, key: tuple[int, int]) -> tuple[list[Tensor], int]:
        epoch, index = key
        return self.augment(self.images.encoded(index), seed=self.seed, epoch=epoch, index=index), index


@dataclass(frozen=True, eq=False)
class TrainingImages(Dataset[tuple[list[Tensor], int, str]]):
    """(tensors of the augmentation, index, "") by (epoch, index); of another image, and why, if one cannot be read."""

    images: ImageSet
    augment: Augmentation
    seed: int

    def __getitem__(self, key: tuple[int, int]) -> tuple[list[Tensor], int, str]:
        epoch, index = key

        def read(number: int) -> list[Tensor]:
            # Of the index asked for, whatever image there is: what is drawn for one position does not depend on the files.
            return self.augment(self.images.encoded(number), seed=self.seed, epoch=epoch, index=index)

        views, problem = read_or_replace(read, index, total=len(self.images), seed=self.seed, epoch=epoch)
        return views, index, problem


@dataclass(frozen=True, kw_only=True)
class TrainBatches:
    """The (epoch, index) pairs of each micro-batch of one process, from `start_step` on.

    Step s takes entries [p, p + G) of the order of epoch s // steps_per_epoch, with p = (s % steps_per_epoch) * G and
    G = batch_size * accumulate * world_size; micro-batch a of process r is slice a * world_size + r of these G. So the images
    of a step do not depend on how G is divided. What is left at the end of an epoch is dropped.
    """

    num_images: int
    seed: int
    batch_size: int
    accumulate: int
    start_step: int
    total_steps: int
    rank: int
    world_size: int

    def __len__(self) -> int:
        return (self.total_steps - self.start_step) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        slices = self.accumulate * self.world_size
        epoch_length = steps_per_epoch(self.num_images, self.batch_size * slices)
        order, ordered = np.empty(0, np.int64), -1
        for step in range(self.start_step, self.total_steps):
            epoch, position = divmod(step, epoch_length)
            if epoch != ordered:
                order, ordered = epoch_order(self.num_images, seed=self.seed, epoch=epoch), epoch
            for micro in range(self.accumulate):
                start = (position * slices + micro * self.world_size + self.rank) * self.batch_size
                yield [(epoch, index) for index in order[start : start + self.batch_size].tolist()]


def steps_per_epoch(num_images: int, global_batch: int) -> int:
    """Whole global batches in one pass over the images."""
    return num_images // global_batch


def epoch_order(num_images: int, *, seed: int, epoch: int) -> np.ndarray:
    """(M,) int64: the order of the images in one epoch, a pure function of seed and epoch."""
    # Mixed rather than added, or seed 1 would repeat the epochs of seed 0 one later.
    state = np.random.SeedSequence((seed % 2**64, epoch)).generate_state(1, np.uint64)
    return torch.randperm(num_images, generator=torch.Generator().manual_seed(int(state[0]))).numpy()


def train_loader(
    images: ImageSet, augment: Augmentation, *, seed: int, batch_size: int, accumulate: int, start_step: int, total_steps: int,
    rank: int, world_size: int, workers: int | None, device: torch.device,
) -> DataLoader:  # fmt: skip
    """Micro-batches of the whole rest of a run, in one iterator whose workers live until its end.

    batch_size: images of one process in one forward pass.   start_step: steps done before; their images are not read.
    workers: loader processes, 0 for none, None for `default_workers()`; they change no bit.   device: where batches will go.
    Each item: the tensors of the augmentation, each with the images of the batch as its first dimension; (B,) int64 image
    numbers; and for each of the B why it cannot be read, so that it was replaced, or "".
    """
    batches = TrainBatches(
        num_images=len(images), seed=seed, batch_size=batch_size, accumulate=accumulate, start_step=start_step,
        total_steps=total_steps, rank=rank, world_size=world_size,
    )  # fmt: skip
    return DataLoader(
        TrainingImages(images, augment, seed), batch_sampler=batches, num_workers=_number(workers),
        pin_memory=device.type == "cuda", worker_init_fn=start_worker, generator=torch.Generator(),
        prefetch_factor=PREFETCH if _number(workers) else None,
    )  # fmt: skip


def index_loader(
    images: ImageSet, transform: Callable[[Image.Image], Any], indices: Sequence[int] | np.ndarray, *, batch_size: int,
    workers: int | None, device: torch.device, skip_broken: bool = False,
) -> DataLoader:  # fmt: skip
    """The images `indices`, transformed, in this order, the last batch smaller.

    workers, device: as for `train_loader`.   Each item: (B, 3, S, S) float32 and (B,) int64 image numbers; what a
    transform returns beside the image comes beside the batch.   BrokenImage for one that cannot be read; with `skip_broken`
    it is black instead, and its number i is ~i, below 0.
    """
    order = np.asarray(indices, np.int64).tolist()
    return DataLoader(
        TransformedImages(images, transform, skip_broken), batch_size=batch_size, sampler=order, num_workers=_number(workers),
        pin_memory=device.type == "cuda", worker_init_fn=start_worker, generator=torch.Generator(),
    )  # fmt: skip


def default_workers() -> int:
    """Loader processes for this process: the cores that it may use, shared between the processes of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    per_task = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if per_task and os.environ.get("SLURM_NTASKS") == str(distributed.world_size()):
        return max(1, min(cores, int(per_task)))  # each process is a SLURM task, with so many cores of its own
    return max(1, cores // distributed.local_world_size())


def _number(workers: int | None) -> int:
    return default_workers() if workers is None else workers


def start_worker(worker: int) -> None:
    """Keep to one thread, and leave to the training process the signals of schedulers and terminals, which go to all processes:
    it needs the images to finish its step. Only a SIGTERM that it sends itself ends this process."""
    torch.set_num_threads(1)
    keep_freed_memory()
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_obey_parent, daemon=True).start()


def keep_freed_memory() -> None:
    """Let glibc keep memory for the next large array instead of giving it back to the system, where there is glibc.

    Otherwise each array of more than some 100 kB comes as untouched pages, and touching them takes longer than filling them:
    making floats of 8-bit views took eight times as long.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # their numbers in malloc.h
        mallopt(trim_threshold, 2**30)
        if not mallopt(mmap_threshold, 2**30):
            mallopt(mmap_threshold, 2**25)  # the most that older versions take


def _obey_parent() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)
