"""The record of a result: where it is written, and with which settings, model and versions."""

from __future__ import annotations

import dataclasses
import platform
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import PIL
import timm
import torch
import torchvision

from dino_simpool import __version__, distributed
from dino_simpool.config import EvalConfig
from dino_simpool.files import file_sha256, write_atomically
from dino_simpool.models.encoder import Encoder

NAMED_OPTIONS = ("dataset", "layout", "preset")
"""Options whose values are part of the name of a results file."""


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
