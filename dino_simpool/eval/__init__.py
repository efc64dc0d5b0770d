"""Evaluators: frozen encoder in, results.json out. `run` is what each command calls; the rest is what evaluators share.

An evaluator is a function evaluate(encoder, cfg) -> dict. Numbers in it are metrics, in % but for a `ratio`; tensors are
saved beside the results; anything else (counts, what a choice was made on, curves) is written into the record as it is, also
in place of a general entry (dataset, split, preprocessing) that does not fit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from dino_simpool import distributed
from dino_simpool.checkpoint import load_encoder
from dino_simpool.config import EvalConfig, to_dict
from dino_simpool.data import ImageSet, class_folder
from dino_simpool.features.encode import preprocessing
from dino_simpool.files import write_atomically
from dino_simpool.results import _device_name, describe, model_record, result_name, results_folder, versions


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
    return images.with_decoding(max_pixels=cfg.max_pixels, exif_orientation=cfg.exif_orientation)


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
