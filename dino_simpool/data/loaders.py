"""From image sets to batches of B images with side S: transform, order in training, loaders."""

from __future__ import annotations

import ctypes
import hashlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dino_simpool import distributed
from dino_simpool.data.augment import to_tensor
from dino_simpool.data.decode import BrokenImage, EncodedImage
from dino_simpool.data.sources import ImageSet
from dino_simpool.signals import KINDS

LONGEST = 64
"""EvalTransform keeps this multiple of the shorter side; more could take gigabytes to resize."""
MAX_ATTEMPTS = 100
"""Images to try in place of a broken one. If all fail, the files are not the problem."""

T = TypeVar("T")


@dataclass(frozen=True)
class EvalTransform:
    """The published evaluation transform: resize with Pillow, center crop, normalize."""

    image_size: int
    """Side S of the square output, in pixels."""
    _: KW_ONLY
    resize: int | None
    """Shorter side before the crop. None: image_size * 256 / 224, as published."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"

    def __post_init__(self) -> None:
        if self.resize is not None and self.resize < self.image_size:
            raise ValueError(f"resize is {self.resize}: a center crop of {self.image_size} needs {self.image_size} or more")

    def __call__(self, image: Image.Image) -> Tensor:
        """(3, S, S) float32 of an RGB image."""
        short = self.resize or self.image_size * 256 // 224
        shorter = min(image.size)
        if max(image.size) > LONGEST * shorter:
            # Sides stay even or odd, so the center stays too.
            sides = [min(side, LONGEST * shorter + side % 2) for side in image.size]
            left, top = ((side - kept) // 2 for side, kept in zip(image.size, sides, strict=True))
            image = image.crop((left, top, left + sides[0], top + sides[1]))
        method = Image.Resampling[self.interpolation.upper()]
        image = image.resize((short * image.width // shorter, short * image.height // shorter), method)
        left, top = round((image.width - self.image_size) / 2), round((image.height - self.image_size) / 2)
        image = image.crop((left, top, left + self.image_size, top + self.image_size))
        return to_tensor([image], mean=self.mean, std=self.std)[0]


class Augmentation(Protocol):
    """Turns an image file into tensors, a pure function of its arguments, such as MultiCrop."""

    def __call__(self, file: EncodedImage, *, seed: int, epoch: int, index: int) -> list[Tensor]: ...


@dataclass(frozen=True, eq=False)
class TransformedImages(Dataset[tuple[Any, ...]]):
    """(transformed image, index) by index; with `skip_broken`, (black image, ~index) if broken.

    `with_keys`: and the `file_key` of its file.
    """

    images: ImageSet
    transform: Callable[[Image.Image], Any]
    skip_broken: bool = False
    with_keys: bool = False

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        key = 0
        try:
            file = self.images.encoded(index)
            key = file_key(file.file) if self.with_keys else key
            item = self.transform(self.images.decoded(index, file)), index
        except BrokenImage:
            if not self.skip_broken:
                raise
            item = self.transform(Image.new("RGB", (LONGEST, LONGEST))), ~index
        return (*item, key) if self.with_keys else item


def file_key(content: bytes) -> int:
    """A number for the content of a file, 64 bits of its SHA-256: equal for equal files, and of two
    sets of a million files each, two others have the same with a chance of 1 in 18 million."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little", signed=True)


@dataclass(frozen=True, eq=False)
class AugmentedImages(Dataset[tuple[list[Tensor], int, str, int]]):
    """(views, index, "", index) by (epoch, index).

    `replace_broken`: of a broken image (views of another one, index, what is wrong, the other's).
    """

    images: ImageSet
    augment: Augmentation
    seed: int
    replace_broken: bool = False

    def __getitem__(self, key: tuple[int, int]) -> tuple[list[Tensor], int, str, int]:
        epoch, index = key

        def read(number: int) -> tuple[list[Tensor], int]:
            # `index`, not `number`: the random numbers of a position do not depend on the files.
            return self.augment(self.images.encoded(number), seed=self.seed, epoch=epoch, index=index), number

        if not self.replace_broken:
            return read(index)[0], index, "", index
        (views, shown), problem = read_or_replace(read, index, total=len(self.images), seed=self.seed, epoch=epoch)
        return views, index, problem, shown


def read_or_replace(read: Callable[[int], T], index: int, *, total: int, seed: int, epoch: int) -> tuple[T, str]:
    """(read(index), ""), or (read of another image, what is wrong with this one) if it is broken.

    read: takes an image number, 0 to total - 1.   A broken replacement is skipped silently, because
    it has its own turn. BrokenImage if MAX_ATTEMPTS others are broken too.
    """
    try:
        return read(index), ""
    except BrokenImage as error:
        broken = error
    if total == 1:
        raise broken
    for attempt in range(MAX_ATTEMPTS):
        with suppress(BrokenImage):
            return read(replacement(index, total=total, seed=seed, epoch=epoch, attempt=attempt)), broken.reason
    raise BrokenImage(broken.name, f"{broken.reason}; {MAX_ATTEMPTS} others drawn in its place are broken too") from broken


def replacement(index: int, *, total: int, seed: int, epoch: int, attempt: int) -> int:
    """The number of another image, uniform over the total - 1 others: a pure function (Philox)."""
    # The second word of the key is 0 for the augmentation: its numbers are independent of these.
    key, counter = np.array([seed % 2**64, 1], np.uint64), np.array([0, attempt, index, epoch], np.uint64)
    return (index + 1 + int(np.random.Philox(key=key, counter=counter).random_raw()) % (total - 1)) % total


@dataclass(frozen=True, kw_only=True)
class TrainBatches:
    """The (epoch, index) pairs of each micro-batch of one process, starting at `start_step`.

    Step s takes entries [p, p + G) of the order of epoch s // steps_per_epoch, with
    p = (s % steps_per_epoch) * G and G = batch_size * accumulate * world_size. Micro-batch a of
    process r is slice a * world_size + r of these G entries, so the images of a step do not depend
    on how G is divided. steps_per_epoch is num_images // G, so the remainder is dropped.
    """

    num_images: int
    seed: int
    batch_size: int
    """Images of one process in one forward pass."""
    total_steps: int
    start_step: int = 0
    """Steps already done, whose images are not read."""
    accumulate: int = 1
    rank: int = field(default_factory=distributed.rank)
    world_size: int = field(default_factory=distributed.world_size)

    def __len__(self) -> int:
        return (self.total_steps - self.start_step) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        slices = self.accumulate * self.world_size
        epoch_length = self.num_images // (self.batch_size * slices)
        order, ordered = np.empty(0, np.int64), -1
        for step in range(self.start_step, self.total_steps):
            epoch, position = divmod(step, epoch_length)
            if epoch != ordered:
                order, ordered = epoch_order(self.num_images, seed=self.seed, epoch=epoch), epoch
            for micro in range(self.accumulate):
                start = (position * slices + micro * self.world_size + self.rank) * self.batch_size
                yield [(epoch, index) for index in order[start : start + self.batch_size].tolist()]


def epoch_order(num_images: int, *, seed: int, epoch: int) -> np.ndarray:
    """(num_images,) int64: the order of one epoch, a pure function of seed and epoch."""
    # Mixed and not added, because seed 1 would then repeat the epochs of seed 0 one epoch later.
    state = np.random.SeedSequence((seed % 2**64, epoch)).generate_state(1, np.uint64)
    return torch.randperm(num_images, generator=torch.Generator().manual_seed(int(state[0]))).numpy()


def train_loader(
    images: ImageSet, augment: Augmentation, batches: TrainBatches, *, workers: int | None, device: torch.device
) -> DataLoader:
    """The batches, in one iterator whose workers live until its end.

    workers: loader processes, 0 for none, None for `default_workers()`; they do not change a bit.
    device: where batches will go.   Each item: the tensors of the augmentation, each (B, ...); (B,)
    int64 image numbers; for each image "", or what is wrong with it if it was replaced; and (B,)
    int64 numbers of the images that are shown.
    """
    dataset = AugmentedImages(images, augment, batches.seed, replace_broken=True)
    # Each loader process prepares four batches ahead, so one slow image does not stop the run.
    return _loader(dataset, batches, workers=workers, device=device, prefetch=4)


def index_loader(
    images: ImageSet,
    transform: Callable[[Image.Image], Any],
    indices: Sequence[int] | np.ndarray,
    *,
    batch_size: int,
    workers: int | None,
    device: torch.device,
    skip_broken: bool = False,
    with_keys: bool = False,
) -> DataLoader:
    """The images `indices`, transformed, in this order. The last batch may be smaller.

    workers, device: as in `train_loader`.   Each item: (B, 3, S, S) float32 and (B,) int64 image
    numbers; whatever else a transform returns is collated too.   BrokenImage for a broken image.
    With `skip_broken` it is black instead, and its number i becomes ~i, below 0. `with_keys`: and
    (B,) int64, the `file_key` of each file.
    """
    order = np.asarray(indices, np.int64).tolist()
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return _loader(TransformedImages(images, transform, skip_broken, with_keys), batches, workers=workers, device=device)


def _loader(
    dataset: Dataset[Any], batches: Iterable[list[Any]], *, workers: int | None, device: torch.device, prefetch: int = 2
) -> DataLoader:
    workers = default_workers() if workers is None else workers
    if (
        workers
        and multiprocessing.get_start_method() != "fork"
        and getattr(sys.modules["__main__"], "__file__", "") == "<stdin>"
    ):
        raise ValueError(
            f"Python starts loader processes here by {multiprocessing.get_start_method()}, which imports the script again, and "
            "one that is read from stdin cannot be: write it to a file, or give workers 0 (in training: data.workers)"
        )
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # its default is a draw from the global one
        prefetch_factor=prefetch if workers else None,
    )


def default_workers() -> int:
    """The number of loader processes: the cores of this process, or its share of the machine's."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    per_task = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if per_task and os.environ.get("SLURM_NTASKS") == str(distributed.world_size()):
        return max(1, min(cores, int(per_task)))  # each process is a SLURM task with its own cores
    return max(1, cores // distributed.local_world_size())


def start_worker(worker: int) -> None:
    """Set up a loader process: one thread, and of the signals only its parent's SIGTERM counts.

    Schedulers and terminals send signals to all processes, but the parent still needs images to
    finish its step.
    """
    torch.set_num_threads(1)
    keep_freed_memory()
    for kind in KINDS:
        if kind != signal.SIGTERM:
            signal.signal(kind, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_obey_parent, daemon=True).start()


def keep_freed_memory() -> None:
    """Let glibc, if present, keep freed memory for the next large array.

    Otherwise each array above about 100 kB gets untouched pages from the system, and touching them
    takes longer than filling them: converting 8-bit views to floats took eight times as long.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # as numbered in malloc.h
        mallopt(trim_threshold, 2**30)
        if not mallopt(mmap_threshold, 2**30):
            mallopt(mmap_threshold, 2**25)  # the maximum of older versions


def _obey_parent() -> None:
    # Not os.getppid(), which is a server of processes where Python starts them by one.
    parent = multiprocessing.parent_process()
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != (parent.pid if parent else os.getppid()):
        pass
    os._exit(0)
