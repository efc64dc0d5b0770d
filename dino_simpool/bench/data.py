"""Time from image files to the views of a training run, in processor time of one core, as a whole
and part by part.

    published      recipe of facebookresearch/dino and billpsomas/simpool: torchvision and Pillow
    cpu            this package, all on the CPU: decode, crop, colors, normalization of the batch
    device_share   the CPU's part if colors are applied on the device: decode and crop
    decode         decoding alone, at full size: only decoding large JPEGs smaller is faster

All start from the bytes of the files in memory. Every batch goes through all four in turn, so that
other load on the machine affects them alike. Times are processor time of this process, not
wall-clock time. `device` has the speed of the device's part.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision import transforms

from dino_simpool.bench import interleave, medians, run
from dino_simpool.config import IMAGENET_MEAN, IMAGENET_STD, BenchDataConfig, CropsConfig
from dino_simpool.data import ImageSet, TrainBatches, default_workers, evenly, find_images, keep_freed_memory, train_loader
from dino_simpool.data.augment import MultiCrop, batch, pixels
from dino_simpool.data.decode import EncodedImage, open_image
from dino_simpool.logs import text_table

Way = Callable[[Sequence[EncodedImage]], Any]
"""A method that is measured; it takes the files of a batch."""


def main(cfg: BenchDataConfig) -> None:
    """The command bench data."""
    torch.set_num_threads(1)
    keep_freed_memory()
    run("data", cfg, cfg.out, lambda device: measure_all(cfg, device), describe)


def measure_all(cfg: BenchDataConfig, device: torch.device) -> dict[str, Any]:
    """All measurements, for the record."""
    images = find_images(cfg.data)
    files = [images.encoded(index) for index in evenly(len(images), cfg.images).tolist()]
    for file in files:
        file.rgb()  # names a broken image, which the published recipe would not
    crop = MultiCrop(**asdict(cfg.crops), mean=IMAGENET_MEAN, std=IMAGENET_STD)
    seconds = measure(ways_of(cfg.crops, crop, seed=cfg.seed), files, batch_size=cfg.batch_size, repetitions=cfg.repetitions)
    found: dict[str, Any] = {
        "images": len(files),
        "ms_per_image_and_core": {name: 1000 * value for name, value in seconds.items()},
        "images_per_second_and_core": {name: 1 / value for name, value in seconds.items()},
        "times_published": {name: seconds["published"] / value for name, value in seconds.items()},
        "share_of_decode_limit": {name: seconds["decode"] / value for name, value in seconds.items()},
        "parts_ms": measure_parts(crop, files, seed=cfg.seed, repetitions=cfg.repetitions),
        "device": measure_device(cfg, crop, files, device),
    }
    if cfg.loader_seconds:
        found["loader"] = measure_loader(cfg, crop, images)
    return found


def published_recipe(crops: CropsConfig) -> Callable[[Image.Image], list[Tensor]]:
    """The published augmentation of one image: torchvision's transforms and Pillow's blur."""

    def sometimes(probability: float, change: Callable[[Image.Image], Image.Image]) -> Callable[[Image.Image], Image.Image]:
        return lambda image: change(image) if random.random() < probability else image

    def blur(image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*crops.blur_sigma)))

    def view(kind: int, size: int, scale: tuple[float, float]) -> transforms.Compose:
        return transforms.Compose([
            transforms.RandomResizedCrop(size, scale=scale, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(crops.flip),
            transforms.RandomApply([transforms.ColorJitter(*crops.jitter)], p=crops.jitter_probability),
            transforms.RandomGrayscale(crops.grayscale),
            sometimes(crops.blur[kind], blur),
            sometimes(crops.solarize[kind], ImageOps.solarize),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ])  # fmt: skip

    views = [view(kind, crops.global_size, crops.global_scale) for kind in (0, 1)]
    views += [view(2, crops.local_size, crops.local_scale)] * crops.num_local
    return lambda image: [each(image) for each in views]


def _stacked(crop: MultiCrop, files: Sequence[EncodedImage], *, seed: int) -> list[Tensor]:
    """What the training loader makes of a batch."""
    items = [crop(file, seed=seed, epoch=0, index=index) for index, file in enumerate(files)]
    return [torch.stack(parts) for parts in zip(*items, strict=True)]


def ways_of(crops: CropsConfig, crop: MultiCrop, *, seed: int) -> dict[str, Way]:
    """The methods that are compared."""
    random.seed(seed)
    torch.manual_seed(seed)
    published, on_device = published_recipe(crops), replace(crop, on_device=True)

    def by_published(files: Sequence[EncodedImage]) -> None:
        for file in files:
            with open_image(file.file) as image:
                published(image.convert("RGB"))

    def decode(files: Sequence[EncodedImage]) -> None:
        for file in files:
            file.pixels()

    return {
        "published": by_published,
        "cpu": lambda files: crop.finish(_stacked(crop, files, seed=seed)),
        "device_share": lambda files: _stacked(on_device, files, seed=seed),
        "decode": decode,
    }


def measure(ways: dict[str, Way], files: Sequence[EncodedImage], *, batch_size: int, repetitions: int) -> dict[str, float]:
    """Seconds of processor time per image of each method, the median over the rounds."""
    rounds = []
    for _ in range(repetitions):
        spent = dict.fromkeys(ways, 0.0)
        for start in range(0, len(files), batch_size):
            for name, way in ways.items():
                fresh = [replace(file) for file in files[start : start + batch_size]]  # a file caches its header
                started = time.process_time()
                way(fresh)
                spent[name] += time.process_time() - started
        rounds.append(spent)
    return medians({name: [spent[name] / len(files) for spent in rounds] for name in ways})


def measure_parts(crop: MultiCrop, files: Sequence[EncodedImage], *, seed: int, repetitions: int) -> dict[str, float]:
    """Milliseconds per image of each part of both paths in sequence, median over the rounds."""
    rounds: list[dict[str, float]] = []
    for _ in range(repetitions):
        rounds.append(defaultdict(float))
        for index, file in enumerate(map(replace, files)):
            started = time.process_time()
            for name in _parts(crop, file, seed=seed, index=index):
                rounds[-1][name] += time.process_time() - started
                started = time.process_time()
    return medians({name: [1000 * spent[name] / len(files) for spent in rounds] for name in rounds[0]})


def _parts(crop: MultiCrop, file: EncodedImage, *, seed: int, index: int) -> Iterator[str]:
    """Go through both paths, and yield the name of each part when it is done."""
    _ = file.jpeg_size
    yield "header"
    image = file.pixels()
    yield "decode"
    draw = crop.draw(*image.shape[:2], seed=seed, epoch=0, index=index)
    yield "draw"
    boxes = zip(draw.box.tolist(), crop.sizes, strict=True)
    views = [pixels.resized_crop(image, tuple(box), size) for box, size in boxes]
    yield "crop and resize"
    batch.pack(draw, radius=crop.blur_radius)
    yield "pack (device path)"
    done = [torch.from_numpy(pixels.apply_colors(view, draw, i)) for i, view in enumerate(views)]
    yield "flip, colours, blur (cpu path)"  # a key of data.json, which keeps its spelling
    crop.finish([view[None] for view in done])
    yield "normalise (cpu path)"


def measure_device(
    cfg: BenchDataConfig, crop: MultiCrop, files: Sequence[EncodedImage], device: torch.device
) -> dict[str, Any]:
    """Images per second of the device's part of the device path, for batches already there."""
    on_device = replace(crop, on_device=True)
    size = cfg.device_batch or (4 if device.type == "cpu" else 128)
    stacked = _stacked(on_device, [files[i % len(files)] for i in range(size)], seed=cfg.seed)
    parts = [part.to(device) for part in stacked]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16

    def finish() -> None:
        on_device.finish(parts, dtype=dtype, compiled=cfg.compile)

    finish()  # compiles, and allocates memory
    name = "finish on the device"
    seconds, _ = interleave({name: finish}, repetitions=max(5, cfg.repetitions), device=device)
    speed = size / medians(seconds)[name]
    return {"images_per_second": speed, "batch": size, "dtype": str(dtype), "compiled": cfg.compile}


def measure_loader(cfg: BenchDataConfig, crop: MultiCrop, images: ImageSet) -> dict[str, Any]:
    """Images per second from the training loader, files included, in wall-clock time."""
    workers = default_workers() if cfg.workers is None else cfg.workers
    size = min(cfg.batch_size, len(images))
    speeds: dict[str, Any] = {"workers": workers}
    for name, augment in (("cpu", crop), ("device_share", replace(crop, on_device=True))):
        steps = TrainBatches(num_images=len(images), seed=cfg.seed, batch_size=size, total_steps=10**6, rank=0, world_size=1)
        loader = train_loader(images, augment, steps, workers=workers, device=torch.device("cpu"))
        batches = iter(loader)
        for _ in range(4 * max(1, workers) + 1):  # past the batches that were ready at the start
            next(batches)
        started, count = time.perf_counter(), 0
        while time.perf_counter() - started < cfg.loader_seconds:
            next(batches)
            count += size
        speeds[name] = count / (time.perf_counter() - started)
        del batches, loader
    return speeds


def describe(record: dict[str, Any]) -> str:
    """The tables that are printed."""
    names = {
        "published": "published recipe (torchvision on Pillow)",
        "cpu": "CPU path",
        "device_share": "device path, CPU's share",
        "decode": "decoding alone",
    }
    rows = [["method", "ms/image/core", "images/s/core", "times published", "share of the decode limit"]]
    for name, title in names.items():
        ms, speed = record["ms_per_image_and_core"][name], record["images_per_second_and_core"][name]
        times, share = record["times_published"][name], record["share_of_decode_limit"][name]
        rows.append([title, f"{ms:.2f}", f"{speed:.0f}", f"{times:.2f}", f"{100 * share:.0f} %"])
    parts = [["part", "ms/image"], *([name, f"{value:.3f}"] for name, value in record["parts_ms"].items())]
    device = record["device"]
    lines = [text_table(rows, rule=True), "", text_table(parts, rule=True), ""]
    lines.append(
        f"device's part on {record['machine']['device']}: {device['images_per_second']:,.0f} images/s in batches of "
        f"{device['batch']} ({device['dtype']}{', compiled' if device['compiled'] else ''})"
    )
    if loader := record.get("loader"):
        lines.append(
            f"loader with {loader['workers']} processes: CPU path {loader['cpu']:,.0f} images/s, device path "
            f"{loader['device_share']:,.0f} images/s"
        )
    return "\n".join(lines)
