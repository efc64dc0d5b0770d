"""Evaluators: frozen encoder in, results.json out. `run` is what each command calls; the rest is what evaluators share.

An evaluator is a function evaluate(encoder, cfg) -> dict. Numbers in it are metrics, in % but for a `ratio`; tensors are
saved beside the results; anything else (counts, what a choice was made on, curves) is written into the record as it is, also
in place of a general entry (dataset, split, preprocessing) that does not fit.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import PIL
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor

from dino_simpool import __version__, distributed
from dino_simpool.checkpoint import file_sha256, load_encoder, write_atomically
from dino_simpool.config import IMAGENET_MEAN, IMAGENET_STD, EvalConfig, to_dict
from dino_simpool.data import ImageSet, class_folder
from dino_simpool.model import Encoder

NAMED_OPTIONS = ("dataset", "layout", "preset")
"""Options whose values are part of the name of a results file."""
MAX_BYTES = 2**28
"""Size of each working array of an evaluator."""


def run(name: str, evaluate: Callable[[Any, Any], dict[str, Any]], cfg: EvalConfig) -> dict[str, Any]:
    """Evaluate a checkpoint, write <out>/<name>.json (tensors: <name>.safetensors), print the metrics and return the record.

    name: of the evaluator. evaluate: see the module. cfg: its options; the file is called after those that must not be mixed up
    (`result_name`). Under torchrun or SLURM all processes take part and the main one writes. ValueError or OSError, in one line
    and before anything is computed, if an input is missing or the folder cannot be written.
    """
    started = time.perf_counter()
    device = distributed.setup(cfg.device)
    evaluator = f"{name}_grid" if getattr(cfg, "protocol", None) == "grid" else name
    encoder = None
    if cfg.checkpoint:
        encoder = load_encoder(cfg.checkpoint, which=cfg.which, min_over=cfg.min_over).to(device)
    elif getattr(cfg, "features", None) != "pixels":
        raise ValueError("no checkpoint is given: say --checkpoint RUN/last.pth (or backbone.safetensors)")
    folder = results_folder(cfg.out, cfg.checkpoint)
    # Both before the evaluation: a training run may replace the file meanwhile.
    model = None if encoder is None else model_record(encoder, cfg.checkpoint, cfg.which)
    settings = preprocessing(encoder, cfg)
    torch.manual_seed(cfg.seed)
    result = evaluate(encoder, cfg)
    tensors = {key: value for key, value in result.items() if isinstance(value, Tensor)}
    metrics = {key: value for key, value in result.items() if isinstance(value, (int, float))}
    record: dict[str, Any] = {
        "evaluator": evaluator, "dataset": cfg.data, "split": cfg.val, "metrics": metrics, "units": "%",
        "config": to_dict(cfg), "preprocessing": settings, "model": model, "versions": versions(),
        "device": _device_name(device), "processes": distributed.world_size(), "dtype": cfg.precision, "seed": cfg.seed,
        **{key: value for key, value in result.items() if key not in metrics and key not in tensors},
        "seconds": time.perf_counter() - started,
    }  # fmt: skip
    if distributed.is_main():
        path = folder / f"{result_name(evaluator, cfg)}.json"
        text = json.dumps(record, indent=2, allow_nan=False) + "\n"
        if tensors:
            write_atomically(path.with_suffix(".safetensors"), lambda file: save_file(tensors, file))
        write_atomically(path, lambda file: file.write_text(text))
        print(describe(record, path))
    distributed.barrier()
    return record


def result_name(evaluator: str, cfg: EvalConfig) -> str:
    """The name of the results file without suffix: knn, knn_pixels, knn_untrained, knn_student, knn_epoch_0020, linear_grid ...

    The default folder is shared by all checkpoints of a run, hence those other than its newest are named in it.
    """
    if getattr(cfg, "features", None) == "pixels":
        return f"{evaluator}_pixels"
    evaluator = "_".join([evaluator, *filter(None, (getattr(cfg, name, "") for name in NAMED_OPTIONS))])
    if cfg.which == "untrained":
        return f"{evaluator}_untrained"
    parts = [evaluator] if cfg.which == "teacher" else [evaluator, cfg.which]
    checkpoint = Path(cfg.checkpoint).stem
    return "_".join(parts if cfg.out or checkpoint in ("last", "backbone") else [*parts, checkpoint])


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


def class_folders(cfg: EvalConfig) -> tuple[ImageSet, ImageSet]:
    """The labelled images to learn from and to measure on; cfg.subset_per_class limits the former.

    ValueError if a folder is missing or empty, or if val has a class that train lacks.
    """
    if not cfg.data:
        raise ValueError("no data is given: say --data DIR, a folder with the class folders train/ and val/")
    train = decoded(class_folder(str(Path(cfg.data) / cfg.train), subset_per_class=cfg.subset_per_class), cfg)
    val = decoded(class_folder(str(Path(cfg.data) / cfg.val)), cfg)
    classes_of(val, train)
    return train, val


def decoded(images: ImageSet, cfg: EvalConfig) -> ImageSet:
    """The same images, decoded as cfg says. Every image set of an evaluator goes through here."""
    return images.decoded(max_pixels=cfg.max_pixels, exif_orientation=cfg.exif_orientation)


def classes_of(images: ImageSet, train: ImageSet) -> Tensor:
    """The classes (M,) of the images, numbered as in `train` by their names. ValueError names a class that `train` lacks."""
    number = {name: i for i, name in enumerate(train.classes)}
    missing = [name for name in images.classes if name not in number]
    if missing:
        raise ValueError(
            f"class {missing[0]} of {images.root} is not among the {len(number)} classes of {train.root} "
            f"({len(missing)} such): use the same class folders in both"
        )
    return torch.from_numpy(np.array([number[name] for name in images.classes], dtype=np.int64)[images.labels])


def chunks(count: int, row_bytes: int, *, max_bytes: int = MAX_BYTES, most: int | None = None) -> Iterator[slice]:
    """Slices that cover range(count), each of as many rows of `row_bytes` as fit in max_bytes (1 at least, `most` at most)."""
    step = max(1, max_bytes // max(1, row_bytes))
    step = step if most is None else min(step, most)
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def describe(record: dict[str, Any], path: Path) -> str:
    """What is printed: the metrics to two decimals, what they were measured on, and where they are."""
    model, config = record["model"], record["config"]
    what = f"{model['which']} of {model['checkpoint']}" if model else "raw pixels"
    what = f"raw pixels, as {what} sees them" if model and config.get("features") == "pixels" else what
    counts = ", ".join(f"{number} {name}" for name, number in record.get("counts", {}).items())
    lines = [f"{record['evaluator']}: {what}", f"  {record['dataset']}/{record['split']} ({counts})"]
    lines += [f"  {name:<18} {value:8.2f}{'' if name == 'ratio' else ' %'}" for name, value in record["metrics"].items()]
    return "\n".join([*lines, f"  written to {path}"])


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    packages = {module.__name__: str(module.__version__) for module in (torch, torchvision, timm, np, faiss, PIL)}
    return {"dino_simpool": __version__, "python": platform.python_version(), **packages}


def results_folder(out: str, checkpoint: str) -> Path:
    """The folder for the results, `out` or beside the checkpoint, made and tried by the main process before hours are spent."""
    if not out and not checkpoint:
        raise ValueError("without a checkpoint there is no place for the results: give --out DIR")
    folder = Path(out) if out else Path(checkpoint).parent / "results"
    if distributed.is_main():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / "writable", lambda path: path.touch())
            (folder / "writable").unlink()
        except OSError as error:
            raise ValueError(f"cannot write to {folder} ({error.strerror}): give another --out") from error
    return folder


def model_record(encoder: Encoder, checkpoint: str, which: str) -> dict[str, Any]:
    """An encoder in the record: its options, its checkpoint with SHA-256, which weights of it, and the epochs behind them."""
    source = {"checkpoint": checkpoint, "sha256": file_sha256(checkpoint), "which": which, "epochs": encoder.epochs}
    return dataclasses.asdict(encoder.config) | source


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
