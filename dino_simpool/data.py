"""Where images come from, and the loaders that feed training and evaluation.

A source is a folder of any nesting, several folders, or a text file of paths (`find_images`, no labels), or a class folder
(`class_folder`, labels from the folders, in the order of torchvision's ImageFolder). `read_rgb` makes 8-bit RGB of any image.
`train_loader` yields the augmented views of the whole rest of a run: what an item holds follows from the seed and its position
alone, so a run stopped anywhere goes on exactly, with any number of workers.

Letters: B images, V views, S side of a view in pixels, M dataset size.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dino_simpool import distributed
from dino_simpool.augment import to_tensor

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".gif")
_ENDINGS = " ".join(IMAGE_SUFFIXES)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """The files of a data set, with labels if they came from class folders."""

    root: str
    """Folder that relative paths start from; empty if they start from the current one."""
    paths: np.ndarray
    """(M,) str."""
    labels: np.ndarray | None = None
    """(M,) int64, positions in `classes`, or None."""
    classes: tuple[str, ...] = ()
    """Names of the class folders, sorted."""

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> str:
        """The path of one image, to be opened."""
        return os.path.join(self.root, str(self.paths[index]))


def find_images(roots: str | Sequence[str], *, subset_per_class: int | None = None) -> ImageSet:
    """All images below some folders and in some text files of paths, in a fixed order, without labels.

    A text file has one path a line, relative to the file itself; empty lines and lines that start with # are skipped. With
    `subset_per_class` the first so many images of each top-level folder are taken. Raises FileNotFoundError for a missing
    folder or file, PermissionError for one that may not be read, ValueError for a source without images.
    """
    roots = [roots] if isinstance(roots, str) else list(roots)
    if not roots or "" in roots:
        raise ValueError("no images are given: set data.root to a folder of images, or to a text file with one path a line")
    parts = [
        _read_list(root, subset_per_class) if os.path.isfile(root) else _read_folder(root, subset_per_class) for root in roots
    ]
    if len(parts) == 1:
        return ImageSet(parts[0][0], np.array(parts[0][1]))
    return ImageSet("", np.array([os.path.join(folder, path) for folder, paths in parts for path in paths]))


def class_folder(root: str, *, subset_per_class: int | None = None) -> ImageSet:
    """Labelled images of the form root/class/image: classes are the sorted folder names, images sorted within each.

    With `subset_per_class` the first so many images of each class are taken. Raises FileNotFoundError for a missing folder;
    ValueError if there are no class folders, one has no images, or images lie outside of them.
    """
    paths = _by_class(root)
    empty = [name for name in _visible_folders(root) if name not in paths]
    if empty or not paths:
        problem = f"class folder {empty[0]} has no images" if empty else "no class folders"
        raise ValueError(f"{problem} in {root}: give a folder of the form DIR/CLASS/IMAGE, with files ending in {_ENDINGS}")
    paths = _only_classes(root, paths)
    if subset_per_class is not None:
        paths = _first_of_each(root, paths, subset_per_class)
    labels = np.repeat(np.arange(len(paths)), [len(members) for members in paths.values()])
    return ImageSet(root, np.array([path for members in paths.values() for path in members]), labels, tuple(paths))


def _read_folder(root: str, subset_per_class: int | None) -> tuple[str, list[str]]:
    """The folder itself and the paths of its images, relative to it."""
    paths = _by_class(root)
    if not paths:
        endings = f"at any depth, files ending in {_ENDINGS}"
        raise ValueError(f"no images in {root}: give a folder that holds, {endings}; or a text file with one path a line")
    if subset_per_class is not None:
        paths = _first_of_each(root, _only_classes(root, paths), subset_per_class)
    return root, [path for members in paths.values() for path in members]


def _read_list(file: str, subset_per_class: int | None) -> tuple[str, list[str]]:
    """The folder of a text file and the paths that it names, each of which must exist."""
    if file.lower().endswith(IMAGE_SUFFIXES):
        raise ValueError(f"{file} is one image: give the folder that holds it, or a text file with one path a line")
    if subset_per_class is not None:
        raise ValueError(f"{file} is a text file, without classes for subset_per_class: list only the wanted paths instead")
    try:
        lines = [line.strip() for line in Path(file).read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8: give a folder, or a text file with one path a line") from error
    paths = [line for line in lines if line and not line.startswith("#")]
    if not paths:
        raise ValueError(f"{file} names no images: write one path a line, relative to the file or absolute")
    folder = os.path.dirname(file)
    for path in paths:
        if not os.path.isfile(os.path.join(folder, path)):
            raise FileNotFoundError(
                f"{path}, listed in {file}, does not exist from {folder or '.'}: correct or remove the line"
            )
    return folder, paths


def _by_class(root: str) -> dict[str, list[str]]:
    """Image paths below `root` and relative to it, by top-level folder ("" for those in none).

    The order is ImageFolder's: classes sorted, in a class the folders sorted, in a folder the files sorted.
    """
    if not os.path.isdir(root):
        raise FileNotFoundError(f"{root} is no existing folder: give a folder of images")
    found: list[tuple[str, str]] = []
    try:
        _collect(root, "", frozenset([os.path.realpath(root)]), found)
    except PermissionError as error:
        raise PermissionError(f"{error.filename} may not be read: change its permissions or give another folder") from error
    paths: dict[str, list[str]] = {}
    for folder, name in sorted(found):
        paths.setdefault(folder.split(os.sep)[0], []).append(os.path.join(folder, name))
    return dict(sorted(paths.items()))


def _collect(root: str, folder: str, ancestors: frozenset[str], found: list[tuple[str, str]]) -> None:
    """Append (folder, name) of each image at any depth; hidden files and folders are skipped, links are followed."""
    with os.scandir(os.path.join(root, folder)) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                real = os.path.realpath(entry.path)
                if real not in ancestors:  # a link to a folder that contains it would never end
                    _collect(root, os.path.join(folder, entry.name), ancestors | {real}, found)
            elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                found.append((folder, entry.name))


def _visible_folders(root: str) -> list[str]:
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


def _only_classes(root: str, paths: dict[str, list[str]]) -> dict[str, list[str]]:
    """The same, after making sure that all images lie in class folders."""
    if "" in paths:
        raise ValueError(
            f"{paths[''][0]} and {len(paths['']) - 1} other images in {root} lie in no class folder: move or remove them"
        )
    return paths


def _first_of_each(root: str, paths: dict[str, list[str]], count: int) -> dict[str, list[str]]:
    """The first `count` paths of each class."""
    for name, members in paths.items():
        if len(members) < count:
            raise ValueError(f"class {name} in {root} has {len(members)} images: subset_per_class {count} must be lower")
    return {name: members[:count] for name, members in paths.items()}


def read_rgb(path: str) -> Image.Image:
    """An image file as 8-bit RGB, whatever it holds.

    Transparent pixels are laid on white (a plain conversion would show the colours hidden under them; opaque images are the
    same either way). 16-bit samples keep their high byte. CMYK is converted as Pillow does, without colour profiles. Of an
    animation the first frame is taken. The EXIF orientation is not applied, as in the published code. Raises ValueError with
    the path if the file is missing, broken, or has 32-bit samples, which have no agreed range.
    """
    try:
        with Image.open(path) as image:
            return _to_rgb(image)
    except Exception as error:  # decoders raise what they like, from SyntaxError to struct.error
        raise ValueError(f"{path} cannot be read as an image ({error}): repair or remove it") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        samples = np.asarray(image)
        if samples.dtype.kind == "f" or samples.min() < 0 or samples.max() > 65535:
            raise ValueError("it has 32-bit samples; 8 and 16 bits are known")
        image = Image.fromarray((samples >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


@dataclass(frozen=True)
class EvalTransform:
    """The published evaluation transform: shorter side to `resize` (bicubic, Pillow), centre crop, normalise."""

    image_size: int
    """Side S of the square that comes out, in pixels."""
    _: KW_ONLY
    resize: int | None
    """Shorter side before the crop. None: image_size * 256 / 224, as published."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        if self.resize is not None and self.resize < self.image_size:
            raise ValueError(f"resize is {self.resize}: a centre crop of {self.image_size} needs {self.image_size} or more")

    def __call__(self, image: Image.Image) -> Tensor:
        """(3, S, S) float32 of an RGB image."""
        short = self.resize or self.image_size * 256 // 224
        shorter = min(image.size)
        image = image.resize((short * image.width // shorter, short * image.height // shorter), Image.Resampling.BICUBIC)
        left, top = round((image.width - self.image_size) / 2), round((image.height - self.image_size) / 2)
        image = image.crop((left, top, left + self.image_size, top + self.image_size))
        return to_tensor([image], mean=self.mean, std=self.std)[0]


class Augmentation(Protocol):
    """RGB image to V tensors (3, S, S), a pure function of its arguments; augment.MultiCrop is one."""

    def __call__(self, image: Image.Image, *, seed: int, epoch: int, index: int) -> list[Tensor]: ...


@dataclass(frozen=True, eq=False)
class TransformedImages(Dataset[tuple[Tensor, int]]):
    """(transformed image, index) by index."""

    images: ImageSet
    transform: Callable[[Image.Image], Tensor]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(read_rgb(self.images.path(index))), index


@dataclass(frozen=True, eq=False)
class MultiCropDataset(Dataset[tuple[list[Tensor], int]]):
    """(V views, index) by (epoch, index)."""

    images: ImageSet
    augment: Augmentation
    seed: int

    def __getitem__(self, key: tuple[int, int]) -> tuple[list[Tensor], int]:
        epoch, index = key
        return self.augment(read_rgb(self.images.path(index)), seed=self.seed, epoch=epoch, index=index), index


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
    Each item: a list of V tensors (B, 3, S, S) float32, global views first, and (B,) int64 image numbers.
    """
    batches = TrainBatches(
        num_images=len(images), seed=seed, batch_size=batch_size, accumulate=accumulate, start_step=start_step,
        total_steps=total_steps, rank=rank, world_size=world_size,
    )  # fmt: skip
    return DataLoader(
        MultiCropDataset(images, augment, seed), batch_sampler=batches, num_workers=_number(workers),
        pin_memory=device.type == "cuda", worker_init_fn=_start_worker, generator=torch.Generator(),
    )  # fmt: skip


def index_loader(
    images: ImageSet, transform: Callable[[Image.Image], Tensor], indices: Sequence[int] | np.ndarray, *, batch_size: int,
    workers: int | None, device: torch.device,
) -> DataLoader:  # fmt: skip
    """The images `indices`, transformed, in this order, the last batch smaller.

    workers, device: as for `train_loader`.   Each item: (B, 3, S, S) float32 and (B,) int64 image numbers.
    """
    order = np.asarray(indices, np.int64).tolist()
    return DataLoader(
        TransformedImages(images, transform), batch_size=batch_size, sampler=order, num_workers=_number(workers),
        pin_memory=device.type == "cuda", worker_init_fn=_start_worker, generator=torch.Generator(),
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


def _start_worker(worker: int) -> None:
    """Keep to one thread, and leave to the training process the signals of schedulers and terminals, which go to all processes:
    it needs the images to finish its step. Only a SIGTERM that it sends itself ends this process."""
    torch.set_num_threads(1)
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)
