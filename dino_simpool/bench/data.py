"""Time from image files to the views of a training run, in processor time of one core, as a whole
and part by part.

    published      the recipe of facebookresearch/dino and billpsomas/simpool: torchvision's transforms on Pillow images
    cpu            this package, all on the CPU: decode, crop, colors, and the normalization of the batch
    device_share   the CPU's part if colors are applied on the device: decode and crop
    decode         decoding alone, at full size: only large JPEG files that the paths decode smaller can be faster

All start from the bytes of the files in memory. Every batch goes through all four in turn, so that
other load on the machine affects them alike. Times are processor time of this process, not
wall-clock time. `device` has the speed of the device's part.
"""

from __future__ import annotations

import io
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision import transforms

from dino_simpool import distributed
from dino_simpool.bench import interleave, machine, medians
from dino_simpool.config import IMAGENET_MEAN, IMAGENET_STD, BenchDataConfig, CropsConfig
from dino_simpool.data import ImageSet, TrainBatches, default_workers, evenly, find_images, keep_freed_memory, train_loader
from dino_simpool.data.augment import MultiCrop, batch, pixels
from dino_simpool.data.decode import EncodedImage
from dino_simpool.files import write_json
from dino_simpool.logs import text_table
from dino_simpool.results import results_folder


def main(cfg: BenchDataConfig) -> None:
    """The command bench data."""
    device = distributed.setup(cfg.device)
    results_folder(cfg.out, "")  # fails before the measurements if it cannot write there
    torch.set_num_threads(1)
    keep_freed_memory()
    images = find_images(list(cfg.data) if isinstance(cfg.data, tuple) else cfg.data)
    files = [images.encoded(index) for index in evenly(len(images), cfg.images).tolist()]
    for file in files:
        file.rgb()  # names a broken image, which the published recipe would not
    crop = MultiCrop(**asdict(cfg.crops), mean=IMAGENET_MEAN, std=IMAGENET_STD)
    seconds = measure(ways_of(cfg.crops, crop, seed=cfg.seed), files, batch_size=cfg.batch_size, repetitions=cfg.repetitions)
    record: dict[str, Any] = {
        "benchmark": "data",
        "config": asdict(cfg),
        "machine": machine(device),
        "images": len(files),
        "ms_per_image_and_core": {name: 1000 * value for name, value in seconds.items()},
        "images_per_second_and_core": {name: 1 / value for name, value in seconds.items()},
        "times_published": {name: seconds["published"] / value for name, value in seconds.items()},
        "share_of_decode_limit": {name: seconds["decode"] / value for name, value in seconds.items()},
        "parts_ms": measure_parts(crop, files, seed=cfg.seed, repetitions=cfg.repetitions),
        "device": measure_device(cfg, crop, files, device),
    }
    if cfg.loader_seconds:
        record["loader"] = measure_loader(cfg, crop, images)
    path = Path(cfg.out) / "data.json"
    write_json(path, record)
    print(f"{describe(record)}\nwritten to {path}")


def published_recipe(crops: CropsConfig) -> Callable[[Image.Image], list[Tensor]]:
    """The published augmentation of one image, with the same torchvision transforms as its code,
    and Pillow's blur."""

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


def ways_of(crops: CropsConfig, crop: MultiCrop, *, seed: int) -> dict[str, Callable[[Sequence[EncodedImage]], Any]]:
    """The methods that are compared. Each takes the files of a batch."""
    random.seed(seed)
    torch.manual_seed(seed)
    published, on_device = published_recipe(crops), replace(crop, on_device=True)

    def by_published(files: Sequence[EncodedImage]) -> None:
        for file in files:
            with Image.open(io.BytesIO(file.file)) as image:
                published(image.convert("RGB"))

    def on_cpu(files: Sequence[EncodedImage]) -> None:
        items = [crop(file, seed=seed, epoch=0, index=index) for index, file in enumerate(files)]
        crop.finish([torch.stack(parts) for parts in zip(*items, strict=True)])

    def device_share(files: Sequence[EncodedImage]) -> None:
        items = [on_device(file, seed=seed, epoch=0, index=index) for index, file in enumerate(files)]
        _ = [torch.stack(parts) for parts in zip(*items, strict=True)]

    def decode(files: Sequence[EncodedImage]) -> None:
        for file in files:
            file.pixels()

    return {"published": by_published, "cpu": on_cpu, "device_share": device_share, "decode": decode}


def measure(
    ways: dict[str, Callable[[Sequence[EncodedImage]], Any]],
    files: Sequence[EncodedImage],
    *,
    batch_size: int,
    repetitions: int,
) -> dict[str, float]:
    """Seconds of processor time per image of each method, the median over the rounds."""
    rounds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repetitions):
        spent = dict.fromkeys(ways, 0.0)
        for start in range(0, len(files), batch_size):
            for name, way in ways.items():
                fresh = [replace(file) for file in files[start : start + batch_size]]  # a file caches its header
                started = time.process_time()
                way(fresh)
                spent[name] += time.process_time() - started
        for name, value in spent.items():
            rounds[name].append(value / len(files))
    return medians(rounds)


def measure_parts(crop: MultiCrop, files: Sequence[EncodedImage], *, seed: int, repetitions: int) -> dict[str, float]:
    """Milliseconds per image of each part of both paths in sequence, median over the rounds."""
    rounds: dict[str, list[float]] = {}
    for _ in range(repetitions):
        spent: dict[str, float] = {}
        started = time.process_time()

        def stop(name: str, spent: dict[str, float] = spent) -> None:
            nonlocal started
            spent[name] = spent.get(name, 0.0) + time.process_time() - started
            started = time.process_time()

        for index, file in enumerate(map(replace, files)):
            started = time.process_time()
            _ = file.jpeg_size
            stop("header")
            image = file.pixels()
            stop("decode")
            draw = crop.draw(*image.shape[:2], seed=seed, epoch=0, index=index)
            stop("draw")
            views = [
                pixels.resized_crop(image, tuple(box), size) for box, size in zip(draw.box.tolist(), crop.sizes, strict=True)
            ]
            stop("crop and resize")
            batch.pack(draw, radius=crop.blur_radius)
            stop("pack (device path)")
            done = [torch.from_numpy(pixels.apply_colors(view, draw, i)) for i, view in enumerate(views)]
            stop("flip, colours, blur (cpu path)")  # a key of data.json, which keeps its spelling
            crop.finish([view[None] for view in done])
            stop("normalise (cpu path)")
        for name, value in spent.items():
            rounds.setdefault(name, []).append(1000 * value / len(files))
    return medians(rounds)


def measure_device(
    cfg: BenchDataConfig, crop: MultiCrop, files: Sequence[EncodedImage], device: torch.device
) -> dict[str, Any]:
    """Images per second of the device's part of the device path, for whole batches that are on the
    device already."""
    on_device = replace(crop, on_device=True)
    size = cfg.device_batch or (4 if device.type == "cpu" else 128)
    items = [on_device(files[i % len(files)], seed=cfg.seed, epoch=0, index=i) for i in range(size)]
    parts = [torch.stack(part).to(device) for part in zip(*items, strict=True)]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16

    def finish() -> None:
        on_device.finish(parts, dtype=dtype, compiled=cfg.compile)

    finish()  # compiles, and allocates memory
    seconds, _ = interleave({"finish on the device": finish}, repetitions=max(5, cfg.repetitions), device=device)
    middle = statistics.median(seconds["finish on the device"])
    return {"images_per_second": size / middle, "batch": size, "dtype": str(dtype), "compiled": cfg.compile}


def measure_loader(cfg: BenchDataConfig, crop: MultiCrop, images: ImageSet) -> dict[str, Any]:
    """Images per second from the training loader with all its processes, in wall-clock time,
    reading files included."""
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
    rows += [
        [
            title,
            f"{record['ms_per_image_and_core'][name]:.2f}",
            f"{record['images_per_second_and_core'][name]:.0f}",
            f"{record['times_published'][name]:.2f}",
            f"{100 * record['share_of_decode_limit'][name]:.0f} %",
        ]
        for name, title in names.items()
    ]
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
