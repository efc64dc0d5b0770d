"""The record of a result: the name of its file, its contents, and how it is written and printed."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dino_simpool import __version__, distributed
from dino_simpool.config import EvalConfig, to_dict
from dino_simpool.files import file_sha256, make_writable, write_atomically, write_json
from dino_simpool.models.encoder import TRAINING, Encoder
from dino_simpool.models.weights import weights_sha256


def result_name(evaluator: str, cfg: EvalConfig) -> str:
    """The name of the results file without suffix: knn, knn_pixels, knn_untrained, knn_student,
    knn_epoch_0020 ... All checkpoints of a run share the default folder, so it names the checkpoint
    unless that is the newest one."""
    parts = [evaluator, *cfg.variant]
    if cfg.needs_encoder and cfg.which != "teacher":
        parts.append(cfg.which)
    checkpoint = Path(cfg.checkpoint).stem
    if cfg.needs_encoder and cfg.which != "untrained" and not cfg.out and checkpoint not in ("", "last", "backbone"):
        parts.append(checkpoint)
    return "_".join(parts)


def results_folder(out: str, checkpoint: str) -> Path:
    """The folder for results: `out`, or results/ beside the checkpoint. ValueError if neither is
    given, or if the main process cannot write there: better now than after hours of work."""
    if not out and not checkpoint:
        raise ValueError("without a checkpoint there is no folder for the results: give --out DIR")
    folder = Path(out) if out else Path(checkpoint).parent / "results"
    return make_writable(folder, "--out") if distributed.is_main() else folder


def write_record(path: Path, record: dict[str, Any], cfg: Any, *, tensors: dict[str, Tensor] | None = None) -> dict[str, Any]:
    """Add the options and the library versions to a record, and return it; the main process also
    writes it to `path`, and the tensors, if any, beside it with the suffix .safetensors."""
    record = record | {"config": to_dict(cfg), "versions": versions()}
    if distributed.is_main():
        json.dumps(record, allow_nan=False)  # ValueError before any file is replaced
        if tensors:
            write_atomically(path.with_suffix(".safetensors"), lambda file: save_file(tensors, file))
        write_json(path, record)
    return record


def versions() -> dict[str, str]:
    """Versions of everything that the numbers depend on; what is not imported yet stays so.

    torch and torchvision, which timm imports, are asked directly: the metadata of their wheels on
    PyPI lacks the build (2.14.1 in place of 2.14.1+cu130).
    """
    import torchvision

    providers = packages_distributions()  # faiss may come from faiss-cpu or faiss-gpu
    return {
        "dino_simpool": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        **{name: version(providers[name][0]) if name in providers else "unknown" for name in ("timm", "numpy", "faiss", "PIL")},
    }


def origin_of(encoder: Encoder, checkpoint: str, weights: str = "") -> dict[str, Any]:
    """Where the weights of an encoder are from, with the SHA-256 of the file: the checkpoint, or of
    timm:NAME its weights (`TimmConfig.weights`). Without a file, that of the weights themselves."""
    if not checkpoint.startswith("timm:"):
        return {"checkpoint": os.path.abspath(checkpoint), "sha256": file_sha256(checkpoint)}
    file = os.path.isfile(weights)
    digest = file_sha256(weights) if file else weights_sha256(encoder)
    return {"checkpoint": checkpoint, "weights": os.path.abspath(weights) if file else weights, "sha256": digest}


def model_record(encoder: Encoder, checkpoint: str, which: str, *, weights: str = "") -> dict[str, Any]:
    """The encoder in the record: options, checkpoint with SHA-256, which weights; epochs so far and
    in all, number of images and their digest of its training, None where the file does not say."""
    source = origin_of(encoder, checkpoint, weights) | {"checkpoint": checkpoint, "which": which}
    training = {name: getattr(encoder, name) for name in TRAINING}
    return dataclasses.asdict(encoder.config) | source | training | {"decoding": to_dict(encoder.decoding)}


def overlap_note(overlap: dict[str, Any]) -> str:
    """What a val set has in common with train (`eval.find_overlap`), in words; "" if nothing."""
    equal, same = overlap.get("equal_files"), overlap.get("same_folder")
    if same and equal is None:  # of features whose images were not read
        return "train and val are the same folder"
    found = f"{equal} of {overlap.get('val')} val images are also in train (same bytes)" if equal or same else ""
    return f"train and val are the same folder; {found}" if same else found


def unfinished_note(model: dict[str, Any] | None) -> str:
    """That weights are from the middle of their run, in words; "" if not, or if it is not known."""
    done, total = ((model or {}).get(name) for name in ("epochs", "total_epochs"))
    middle = isinstance(done, int | float) and isinstance(total, int | float) and 0 < done < total
    return f"the weights are from the middle of their run, epoch {done:.4g} of {total:.4g}" if middle else ""


def describe(record: dict[str, Any], path: Path) -> str:
    """The text that is printed: metrics to two decimals, data, and where the results are."""
    model = record["model"]
    source = f": {model['which']} of {model['checkpoint']}" if model else ""
    counts = ", ".join(f"{number} {name}" for name, number in record.get("counts", {}).items())
    split = f"/{record['split']}" if record["split"] else ""
    lines = [f"{path.stem}{source}", f"  {record['dataset']}{split} ({counts})"]
    lines += [f"  {name:<18} {value:8.2f}{'' if name == 'ratio' else ' %'}" for name, value in record["metrics"].items()]
    for said in filter(None, (overlap_note(record.get("overlap", {})), unfinished_note(model))):
        lines.append(f"  warning: {said}")
    return "\n".join([*lines, f"  written to {path}"])
