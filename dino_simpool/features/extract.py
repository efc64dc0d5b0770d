"""Writes the features of any images to a folder.

    OUT/
        features.npy           float32, one row per image; numpy.load(FILE, mmap_mode="r") maps it
        ids.txt                the name of the image of each row, one per line; as a JSON string if
                               it has characters that a line cannot show (lists.py)
        meta.json              `settings` that determine the numbers, their `hash`, and the `source`
                               of weights and images
        index.faiss            with --index: inner products of the normalized features, for `search`
        labels.npy             with --labels: int64, the class of each row, and
        classes.txt            the names of the classes, one per line

A level is one output of the encoder: `global` (M, D), its feature; `tokens` (M, N, D), what is
pooled; `keys` (M, N, D), SimPool's keys of the tokens (K of eq. 14); `attention` (M, h, w), maps
that sum to 1. Only the index is normalized.

Batch i holds the images from i * batch_size on. One process computes it as a whole, because matrix
products round differently with another number of rows. So the file is the same bit for bit with any
number of workers and processes, and after any number of kills (rows.py). Another batch size changes
the last digits (and min_over="batch" depends on it by definition); another number of threads may
change them too.

M images, N tokens or h x w positions, D width, S side of the square that the encoder sees.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dino_simpool import distributed
from dino_simpool.checkpoint import load_encoder
from dino_simpool.config import ExtractConfig, to_dict
from dino_simpool.data import EvalTransform, ImageSet, class_folder, find_images
from dino_simpool.data.augment import to_tensor
from dino_simpool.data.lists import as_line
from dino_simpool.features import chunks
from dino_simpool.features.encode import Forward, decoding_of, device_of, encode, preprocessing, try_sizes
from dino_simpool.features.rows import RowFile
from dino_simpool.files import Fields, digests_of, file_sha256, read_json, write_atomically, write_json
from dino_simpool.logs import progress
from dino_simpool.models.encoder import Encoder
from dino_simpool.models.pooling.simpool import SimPool
from dino_simpool.models.weights import weights_sha256
from dino_simpool.names import shown_lines
from dino_simpool.results import versions


def main(cfg: ExtractConfig) -> None:
    """The command `dino-simpool extract`."""
    device = distributed.setup(cfg.device)
    for name in ("checkpoint", "data", "out"):
        if not getattr(cfg, name):
            raise ValueError(f"no {name} is given: give --checkpoint RUN/last.pth --data IMAGES --out OUT")
    sources = [os.path.abspath(source) for source in ([cfg.data] if isinstance(cfg.data, str) else cfg.data)]
    if cfg.labels and len(sources) > 1:
        raise ValueError(f"labels need one folder of class folders, given {len(sources)} sources: leave labels out")
    images = class_folder(sources[0], cfg.excluded) if cfg.labels else find_images(sources, cfg.excluded)
    encoder = load_encoder(cfg.checkpoint, which=cfg.which, min_over=cfg.min_over).to(device)
    images = images.with_decoding(decoding_of(cfg, encoder, images))
    view = {"view": cfg.view, **preprocessing(encoder.config, image_size=cfg.image_size, resize=cfg.resize)}
    if cfg.view == "whole":
        del view["resize"]
    checkpoint = os.path.abspath(cfg.checkpoint)
    source = {
        "checkpoint": checkpoint,
        "sha256": file_sha256(checkpoint),
        "which": cfg.which,
        "data": [images.root] if cfg.labels else sources,
        "max_pixels": cfg.max_pixels,
        "exclude": list(cfg.exclude),
    }
    folder = Path(cfg.out)
    done = (folder / "features.npy").is_file()
    features = extract(
        encoder,
        images,
        folder,
        level=cfg.level,
        view=view,
        batch_size=cfg.batch_size,
        workers=cfg.workers,
        precision=cfg.precision,
        source=source,
    )
    if distributed.is_main():
        if images.labels is not None:
            stored = io.BytesIO()
            np.save(stored, images.labels)
            write_atomically(folder / "labels.npy", lambda path: path.write_bytes(stored.getvalue()))
            _write_names(folder / "classes.txt", images.classes)
        if cfg.index:
            index = build_index(features)
            write_atomically(folder / "index.faiss", partial(_write_index, index))
        if cfg.index or cfg.labels:
            beside = ("index.faiss", "labels.npy", "classes.txt")
            add_digests(folder, [name for name in beside if (folder / name).is_file()])
        shape = " x ".join(map(str, features.shape))
        how = "already complete, with these settings and files, in" if done else "written to"
        print(shown_lines(f"extract: {cfg.level}, {shape}, {cfg.which} of {cfg.checkpoint}\n  {how} {folder / 'features.npy'}"))
    distributed.barrier()


def extract(
    encoder: Encoder,
    images: ImageSet,
    out: str | Path,
    *,
    level: str = "global",
    view: dict[str, Any] | None = None,
    batch_size: int = 128,
    workers: int | None = None,
    precision: str = "fp32",
    source: dict[str, Any] | None = None,
) -> np.ndarray:
    """Write features.npy, ids.txt and meta.json to `out` and return the features (M, ...), float32,
    mapped from the file. Features that `out` already holds with the same settings are kept and
    completed. All processes call it together.

    batch_size, workers, precision: as in `Forward`. view: the argument of `make_transform`, None
    for that of the model. source: written to meta.json; `search` needs checkpoint, sha256, which,
    data and max_pixels. The last one is kept: it does not change the numbers, only whether there
    are any. ValueError or OSError, before anything is computed, if the level or the size does not
    suit the encoder, if the disk is too small, or if `out` was made with other settings, which are
    named. Later for a broken image or features that are not finite.
    """
    view = view or {"view": "crop", **preprocessing(encoder.config)}
    method, size, device = level_of(encoder, level), view["image_size"], device_of(encoder)
    try_sizes(encoder, [size])
    decoding = to_dict(images.decoding)
    del decoding["max_pixels"]  # it changes no number
    blank = encode(encoder, torch.zeros(1, 3, size, size), precision=precision, method=method)
    settings = {
        "model": dataclasses.asdict(encoder.config),
        "weights": weights_sha256(encoder),
        "preprocessing": view,
        "level": level,
        "images": {"count": len(images), "names": images.digest(), **decoding},
        "batch_size": batch_size,
        "precision": precision,
        "device": device.type,
        "versions": {name: version for name, version in versions().items() if name not in ("python", "faiss")},
    }
    shape = (len(images), *blank.shape[1:])
    rows = RowFile(Path(out, "features.npy"), shape, block=batch_size, rank=distributed.rank())
    _prepare(Path(out), rows, images, settings=settings, source=source or {})
    if not rows.finished:
        missing = rows.remaining()
        distributed.barrier()  # no process writes the progress until all have read it
        mine = np.array_split(missing, distributed.world_size())[distributed.rank()]
        batches = Forward(make_transform(view), batch_size, workers, precision).batches(images, rows.rows_of(mine), device)
        with rows, progress(len(images), len(images) - len(rows.rows_of(missing)), "extract") as bar:
            for number, (batch, indices) in zip(mine.tolist(), batches, strict=True):
                values = encode(encoder, batch, precision=precision, method=method).cpu()
                _require_finite(values, images, indices)
                rows.write(number, values.numpy())
                bar.update(min(distributed.world_size() * len(values), len(images) - bar.n))
        distributed.barrier()
        if distributed.is_main():
            rows.finish()
        distributed.barrier()
    meta = read_meta(out)
    if distributed.is_main() and meta is not None and not meta.get("files"):
        add_digests(Path(out), ["features.npy", "ids.txt"])
    finished: np.ndarray = np.load(rows.path, mmap_mode="r")
    return finished


def level_of(encoder: Encoder, level: str) -> Callable[[Tensor], Tensor]:
    """The function from images (B, 3, S, S) to a level. ValueError for keys without SimPool."""
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "global": encoder,
        "tokens": encoder.tokens,
        "keys": lambda images: encoder.pool.keys(encoder.tokens(images)),
        "attention": encoder.attention,
    }
    if level not in functions:
        raise ValueError(f"there is no level {level}: use global, tokens, keys or attention")
    if level == "keys" and not isinstance(encoder.pool, SimPool):
        raise ValueError(f"level keys needs SimPool, and this model has pool {encoder.config.pool}: use level tokens")
    return functions[level]


def make_transform(view: dict[str, Any]) -> Callable[[Image.Image], Tensor]:
    """The transform of a view: {view: crop, image_size, resize, mean, std} or {view: whole,
    image_size, mean, std}."""
    options: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in view.items() if name != "view"}
    return partial(squeezed, **options) if view["view"] == "whole" else EvalTransform(**options)


def squeezed(image: Image.Image, *, image_size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The whole RGB image squeezed into a square (bicubic) and normalized: (3, S, S) float32."""
    return to_tensor([image.resize((image_size, image_size), Image.Resampling.BICUBIC)], mean=mean, std=std)[0]


def build_index(features: np.ndarray) -> faiss.IndexFlatIP:
    """An exact faiss index of features (M, D): inner products of unit rows. Zeros stay zero."""
    index = faiss.IndexFlatIP(features.shape[1])
    for part in chunks(len(features), 12 * features.shape[1]):
        index.add(F.normalize(torch.from_numpy(np.array(features[part])).double(), dim=1).float().numpy())
    return index


def _write_index(index: faiss.Index, path: Path) -> None:
    """Write an index through Python: faiss itself does not raise if the last bytes find no room."""
    with open(path, "wb") as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))  # type: ignore[attr-defined]


def read_meta(folder: str | Path) -> dict[str, Any] | None:
    """The meta.json of a folder, None if there is none. ValueError if it cannot be read."""
    path = Path(folder) / "meta.json"
    if not path.exists():
        return None
    what, remedy = "the meta.json of features", "give another folder, or remove this one and extract again"
    meta = read_json(path, META, what=what, remedy=remedy)
    if settings_hash(meta["settings"]) != meta["hash"]:
        raise ValueError(f"{path} is not {what} (its hash does not match its settings): {remedy}")
    return meta


def add_digests(folder: Path, names: Iterable[str]) -> None:
    """Store the SHA-256 of finished files in the meta.json beside them."""
    meta = read_meta(folder)
    assert meta is not None, "written before the rows"
    write_json(folder / "meta.json", meta | {"files": (meta.get("files") or {}) | digests_of(folder, names)})


META: Fields = {
    "settings": dict, "settings.images": dict, "settings.images.names": str, "settings.images.count": int,
    "settings.preprocessing": dict, "settings.model": dict, "settings.batch_size": int, "settings.precision": str, "hash": str,
    "shape": list, "sizes": str, "source": dict, "files?": dict,
}  # fmt: skip


def settings_hash(settings: dict[str, Any]) -> str:
    """SHA-256 of settings in a canonical form."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _prepare(folder: Path, rows: RowFile, images: ImageSet, *, settings: dict[str, Any], source: dict[str, Any]) -> None:
    """Check on every process that the work can start or resume; then the main process writes
    everything but the rows."""
    meta = read_meta(folder)
    if meta is not None and (different := _differences(meta["settings"], json.loads(json.dumps(settings)))):
        raise ValueError(f"{folder} was made with other settings ({different}): give another --out, or those settings")
    sizes = images.sizes_digest()
    if meta is not None and rows.finished and meta["sizes"] != sizes:  # until then, broken files may be repaired
        raise ValueError(
            f"{folder} was made from other files with the same names: give another --out, or remove it to start over"
        )
    if meta is None and rows.finished:
        raise ValueError(f"{folder} has features.npy, but no meta.json says what they are: give another --out")
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    needed, free = rows.missing_bytes(), shutil.disk_usage(there).free
    if needed > free:
        said = f"the features need {needed / 1e9:.2f} GB, but {folder} has {free / 1e9:.2f} GB left"
        raise ValueError(f"{said}: free some, or give another --out")
    distributed.require_agreement(f"what {folder} holds", meta and meta["hash"])
    if distributed.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        if meta is None:
            _write_names(folder / "ids.txt", map(images.name, range(len(images))))
            rows.create()
        if meta is None or meta["sizes"] != sizes or (source and meta["source"] != source):
            files = meta["files"] if meta is not None and meta.get("files") else {}
            record = {"hash": settings_hash(settings), "shape": list(rows.shape), "settings": settings, "files": files}
            # Last: without it, the files above do not count.
            write_json(folder / "meta.json", record | {"sizes": sizes, "source": source})
        if rows.finished:
            rows.forget()
        elif not rows.partial.exists():
            rows.create()
    distributed.barrier()


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> str:
    """The settings that differ: `level global -> tokens, model.gamma 2.0 -> None`, or empty."""
    found = []
    for name in before | now:
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found.append(_differences(old, new, f"{prefix}{name}."))
        elif old != new:
            found.append(f"{prefix}{name} {str(old)[:24]} -> {str(new)[:24]}")
    return ", ".join(text for text in found if text)


def _require_finite(values: Tensor, images: ImageSet, indices: Tensor) -> None:
    if not_finite := indices[~values.flatten(1).sum(1).isfinite()].tolist():
        name = images.name(not_finite[0])
        raise ValueError(f"the features of {name} are not finite: check the weights and that image, and use precision fp32")


def _write_names(path: Path, names: Iterable[str]) -> None:
    """Write one name per line, as a list of paths has them: odd ones as JSON strings."""
    write_atomically(path, lambda file: file.write_text("".join(f"{as_line(name)}\n" for name in names), encoding="utf-8"))
