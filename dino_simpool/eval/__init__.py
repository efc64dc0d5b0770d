"""Evaluators: frozen encoder in, results.json out. `run` is what each command calls; the rest is
what evaluators share.

An evaluator is a function evaluate(encoder, cfg) -> dict. The encoder is on its device; it is None
only if cfg.needs("checkpoint") is false and no checkpoint is given. Of the dict, numbers are
metrics, in %, except for a `ratio`. Tensors are saved beside the results. Everything else (counts,
split, preprocessing, curves, what a choice was based on) goes into the record as it is, and may
replace a general entry that does not fit (evaluator, dataset).

All processes call it together and all return the same; the main one writes. ValueError or OSError
in one line, before anything is computed, if an input is missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dino_simpool import distributed
from dino_simpool.checkpoint import load_encoder
from dino_simpool.config import ClassificationConfig, EvalConfig
from dino_simpool.data import ImageSet, labeled_sets, same_source
from dino_simpool.features.encode import decoding_of
from dino_simpool.models.encoder import Encoder
from dino_simpool.names import shown_lines
from dino_simpool.results import describe, model_record, result_name, results_folder, write_record


def run(name: str, evaluate: Callable[[Any, Any], dict[str, Any]], cfg: EvalConfig) -> dict[str, Any]:
    """Evaluate a checkpoint, write the results to cfg.out, print the metrics and return the record.

    name: of the evaluator. The file is <name>.json, with more in its name if cfg.variant or the
    weights need it (`result_name`). ValueError or OSError, before anything is computed, also if the
    folder cannot be written.
    """
    started = time.perf_counter()
    device = distributed.setup(cfg.device)
    if cfg.needs("checkpoint") and not cfg.checkpoint:
        raise ValueError("no checkpoint is given: give --checkpoint RUN/last.pth (or backbone.safetensors)")
    encoder = model = None
    if cfg.checkpoint:
        encoder = load_encoder(cfg.checkpoint, which=cfg.which, weights=cfg.weights, min_over=cfg.min_over, **cfg.model).to(
            device
        )
        # Before the evaluation: a training run may replace the file in the meantime.
        model = model_record(encoder, cfg.checkpoint, cfg.which, weights=cfg.weights)
    folder = results_folder(cfg.out or ("" if cfg.checkpoint else cfg.default_out), cfg.checkpoint)
    torch.manual_seed(cfg.seed)
    result = evaluate(encoder, cfg)
    tensors = {key: value for key, value in result.items() if isinstance(value, Tensor)}
    metrics = {key: value for key, value in result.items() if isinstance(value, (int, float))}
    record = {
        "evaluator": name,
        "dataset": cfg.data,
        "split": None,
        "metrics": metrics,
        "units": "%",
        "model": model,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": distributed.world_size(),
        "dtype": cfg.precision,
        "seed": cfg.seed,
        **{key: value for key, value in result.items() if key not in metrics and key not in tensors},
        "seconds": time.perf_counter() - started,
    }
    path = folder / f"{result_name(record['evaluator'], cfg)}.json"
    record = write_record(path, record, cfg, tensors=tensors)
    if distributed.is_main():
        print(shown_lines(describe(record if cfg.needs_encoder else record | {"model": None}, path)))
    distributed.barrier()
    return record


def class_folders(cfg: ClassificationConfig, encoder: Encoder | None) -> tuple[ImageSet, ImageSet]:
    """The labeled images to learn from, and those to measure on. FileNotFoundError or ValueError as
    for `labeled_sets`."""
    if not cfg.data:
        raise ValueError("no data is given: give --data DIR, a folder with the class folders train/ and val/")
    train, val = labeled_sets(cfg.train, cfg.val, inside=cfg.data, exclude=cfg.excluded, subset_per_class=cfg.subset_per_class)
    decoding = decoding_of(cfg, encoder, train)
    return train.with_decoding(decoding), val.with_decoding(decoding)


def per_class(correct: Tensor, labels: Tensor, classes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Of each class, in their order: the number of `images`, how many are `correct`, and this share
    `top1` in %, None without images.

    correct: (M,) bool. labels: (M,) int64, positions in `classes`.
    """
    images = labels.bincount(minlength=len(classes)).tolist()
    right = labels[correct].bincount(minlength=len(classes)).tolist()
    return {
        name: {"images": count, "correct": hits, "top1": 100 * hits / count if count else None}
        for name, count, hits in zip(classes, images, right, strict=True)
    }


def balanced_accuracy(correct: Tensor, labels: Tensor) -> float:
    """The mean over the classes that have images, of their shares of correct ones, in %; 0 without
    images. Arguments as in `per_class`."""
    images = labels.bincount()
    shares = labels[correct].bincount(minlength=len(images)).double() / images
    return 100 * shares[images > 0].mean().item() if len(labels) else 0.0


def find_overlap(train: ImageSet, val: ImageSet, train_keys: Tensor, val_keys: Tensor) -> dict[str, Any]:
    """What val has in common with train: whether they are the `same_source`, and how many of its
    files are also in train, byte for byte. keys: the `file_key` of each image that is used."""
    return {
        "same_folder": same_source(train.root, val.root),
        "equal_files": int(torch.isin(val_keys, train_keys).sum()),
        "val": len(val_keys),
    }
