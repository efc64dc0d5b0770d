"""Features of any images in a folder, where numpy maps them into memory: `numpy.load(OUT / "features.npy", mmap_mode="r")`.

    OUT/
        features.npy           float32, a row an image, in the order of the set
        ids.txt                the name of the image of each row, one a line
        meta.json              `settings`, which the numbers follow from, their `hash`, and the `source` of weights and images
        index.faiss            with --index: inner products of the normalised features, for `search`
        labels.npy             with --labels: int64, the class of each row, and
        classes.txt            the names of the classes, one a line

A level is what the encoder gives: `global` (M, D), its feature; `tokens` (M, N, D), what is pooled; `keys` (M, N, D), SimPool's
keys of them (K of eq. 14); `attention` (M, h, w), maps that sum to 1. Nothing is normalised but the index.

Batch i holds the images i * batch_size and following, and is computed by one process as a whole: matrix products round
differently for another number of rows. So the file is the same bit for bit with any number of workers and processes, and after
any number of kills (rows.py); another batch size changes the last digits (and min_over="batch" depends on it by definition),
another number of threads may.

M images, N tokens or h x w positions, D width, S side of the square that the encoder sees.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dino_simpool import distributed
from dino_simpool.checkpoint import load_encoder
from dino_simpool.config import EvalConfig, ExtractConfig
from dino_simpool.data import EvalTransform, ImageSet, class_folder, find_images
from dino_simpool.data.augment import to_tensor
from dino_simpool.features.chunks import chunks
from dino_simpool.features.encode import encode, evaluation_mode, feature_batches, preprocessing
from dino_simpool.features.rows import RowFile
from dino_simpool.files import file_sha256, write_atomically
from dino_simpool.logs import progress
from dino_simpool.models.encoder import Encoder
from dino_simpool.models.pooling.simpool import SimPool
from dino_simpool.results import versions

Level = Literal["global", "tokens", "keys", "attention"]


@dataclass(frozen=True)
class WholeTransform:
    """All of the image squeezed into the square (bicubic, Pillow), and normalised."""

    image_size: int
    """Side S of the square that comes out, in pixels."""
    _: KW_ONLY
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, image: Image.Image) -> Tensor:
        """(3, S, S) float32 of an RGB image."""
        image = image.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)
        return to_tensor([image], mean=self.mean, std=self.std)[0]


def main(cfg: ExtractConfig) -> None:
    """The command `dino-simpool extract`."""
    device = distributed.setup(cfg.device)
    for name, value in (("checkpoint", cfg.checkpoint), ("data", cfg.data), ("out", cfg.out)):
        if not value:
            raise ValueError(f"no {name} is given: say --checkpoint RUN/last.pth --data IMAGES --out OUT")
    sources = [os.path.abspath(source) for source in ([cfg.data] if isinstance(cfg.data, str) else cfg.data)]
    if cfg.labels and len(sources) > 1:
        raise ValueError(f"labels need one folder of class folders, given {len(sources)} sources: leave labels out")
    images = class_folder(sources[0]) if cfg.labels else find_images(sources)
    images = images.with_decoding(max_pixels=cfg.max_pixels, exif_orientation=cfg.exif_orientation)
    sources = [images.root] if cfg.labels else sources
    encoder = load_encoder(cfg.checkpoint, which=cfg.which, min_over=cfg.min_over).to(device)
    view = {"view": cfg.view, **preprocessing(encoder, EvalConfig(image_size=cfg.image_size, resize=cfg.resize))}
    if cfg.view == "whole":
        del view["resize"]
    checkpoint = os.path.abspath(cfg.checkpoint)
    source = {
        "checkpoint": checkpoint,
        "sha256": file_sha256(checkpoint),
        "which": cfg.which,
        "data": sources,
        "max_pixels": cfg.max_pixels,
    }
    done = (Path(cfg.out) / "features.npy").is_file()
    features = extract(
        encoder, images, cfg.out, level=cfg.level, view=view, batch_size=cfg.batch_size, workers=cfg.workers,
        precision=cfg.precision, source=source,
    )  # fmt: skip
    folder = Path(cfg.out)
    if distributed.is_main():
        if images.labels is not None:
            _write_labels(folder, images.labels, images.classes)
        if cfg.index:
            index = build_index(features)
            write_atomically(folder / "index.faiss", lambda path: faiss.write_index(index, str(path)))
        shape = " x ".join(map(str, features.shape))
        how = "there already, of these settings and files, in" if done else "written to"
        print(f"extract: {cfg.level}, {shape}, {cfg.which} of {cfg.checkpoint}\n  {how} {folder / 'features.npy'}")
    distributed.barrier()


def extract(
    encoder: Encoder, images: ImageSet, out: str | Path, *, level: Level = "global", view: dict[str, Any] | None = None,
    batch_size: int = 128, workers: int | None = None, precision: str = "fp32", source: dict[str, Any] | None = None,
) -> np.ndarray:  # fmt: skip
    """Write features.npy, ids.txt and meta.json to `out` and return the features (M, ...), float32, mapped from the file.

    Called by all processes together. What `out` holds of the same settings is kept and completed.
    encoder: on the device where it shall run; it is evaluated in evaluation mode and keeps its modes. view: as `make_transform`
    takes it; None: as the model was made. batch_size: images in one forward pass of one process. workers: loader processes,
    None for the cores there are. precision: fp32 or bf16. source: written to meta.json; `search` needs checkpoint, sha256,
    which, data and max_pixels; the last call's is kept, since no number follows from it but whether there is one.
    ValueError or OSError, before anything is computed, if the level or the size does not go with the encoder, if the disk is
    too small, or if `out` was made with other settings, which are named; later for an image that cannot be read or whose
    features are not finite.
    """
    folder, device = Path(out), next(encoder.parameters()).device
    view = view or {"view": "crop", **preprocessing(encoder, EvalConfig())}
    compute = level_of(encoder, level)
    with evaluation_mode(encoder):
        blank = torch.zeros(1, 3, view["image_size"], view["image_size"])
        shape = (len(images), *encode(compute, blank, device=device, precision=precision).shape[1:])
    matters = {name: version for name, version in versions().items() if name not in ("python", "faiss")}
    settings = {
        "model": dataclasses.asdict(encoder.config), "weights": weights_sha256(encoder), "preprocessing": view, "level": level,
        "images": {"count": len(images), "names": images.digest(), "exif_orientation": images.exif_orientation},
        "batch_size": batch_size, "precision": precision, "device": device.type, "versions": matters,
    }  # fmt: skip
    rows = RowFile(folder / "features.npy", shape, block=batch_size, rank=distributed.rank())
    _prepare(folder, rows, images, settings=settings, source=source or {})
    if not rows.finished:
        batches = rows.remaining()
        distributed.barrier()  # all have read how far it is, before one writes it
        mine = np.array_split(batches, distributed.world_size())[distributed.rank()]
        features = feature_batches(
            compute, images, rows.rows_of(mine), transform=make_transform(view), batch_size=batch_size, workers=workers,
            device=device, precision=precision,
        )  # fmt: skip
        with evaluation_mode(encoder):
            _fill(rows, mine, features, images, done=len(images) - len(rows.rows_of(batches)))
        distributed.barrier()
        if distributed.is_main():
            rows.finish()
        distributed.barrier()
    finished: np.ndarray = np.load(rows.path, mmap_mode="r")
    return finished


def level_of(encoder: Encoder, level: Level) -> Callable[[Tensor], Tensor]:
    """What gives a level of images (B, 3, S, S). ValueError for keys without SimPool."""
    pool = encoder.pool
    if level == "keys":
        if not isinstance(pool, SimPool):
            raise ValueError(f"level keys is of SimPool, this model has pool {encoder.config.pool}: use level tokens")
        return lambda images: pool.keys(encoder.tokens(images))
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "global": encoder,
        "tokens": encoder.tokens,
        "attention": encoder.attention,
    }
    if level not in functions:
        raise ValueError(f"there is no level {level}: use global, tokens, keys or attention")
    return functions[level]


def make_transform(view: dict[str, Any]) -> EvalTransform | WholeTransform:
    """The transform of a view: {view: crop, image_size, resize, mean, std} or {view: whole, image_size, mean, std}."""
    options: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in view.items() if name != "view"}
    return WholeTransform(**options) if view["view"] == "whole" else EvalTransform(**options)


def build_index(features: np.ndarray) -> faiss.IndexFlatIP:
    """An exact faiss index of features (M, D): inner products of the rows scaled to length 1. A row of zeros stays so."""
    index = faiss.IndexFlatIP(features.shape[1])
    for part in chunks(len(features), 12 * features.shape[1]):
        index.add(F.normalize(torch.from_numpy(np.array(features[part])).double(), dim=1).float().numpy())
    return index


def read_meta(folder: str | Path) -> dict[str, Any] | None:
    """The meta.json of a folder, None if there is none. ValueError if it cannot be read."""
    path = Path(folder) / "meta.json"
    if not path.exists():
        return None
    try:
        meta: dict[str, Any] = json.loads(path.read_text())
        if settings_hash(meta["settings"]) != meta["hash"]:
            raise ValueError("its hash is not that of its settings")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or of another tool ({error}): give another folder") from error
    return meta


def settings_hash(settings: dict[str, Any]) -> str:
    """SHA-256 of settings in one canonical spelling."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def weights_sha256(encoder: Encoder) -> str:
    """SHA-256 of the weights by name, the same for a checkpoint and for what was exported from it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _prepare(folder: Path, rows: RowFile, images: ImageSet, *, settings: dict[str, Any], source: dict[str, Any]) -> None:
    """Check on every process that the work can be begun or gone on with, then let the main one write what comes before rows."""
    meta = read_meta(folder)
    if meta is not None and (different := _differences(meta["settings"], json.loads(json.dumps(settings)))):
        raise ValueError(f"{folder} was made with other settings ({different}): give another --out, or those settings")
    sizes = images.sizes_digest()
    if meta is not None and rows.finished and meta["sizes"] != sizes:  # before that a broken file may be repaired
        raise ValueError(f"{folder} is of other files under the same names: give another --out, or remove it to begin again")
    if meta is None and rows.finished:
        raise ValueError(f"{folder} has features.npy, but no meta.json says what they are: give another --out")
    _check_room(folder, rows.missing_bytes())
    distributed.require_agreement(f"what {folder} holds", meta and meta["hash"])
    if distributed.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        wanted = {
            "hash": settings_hash(settings), "shape": list(rows.shape), "settings": settings, "sizes": sizes, "source": source
        }  # fmt: skip
        if meta is None:
            _write_names(folder / "ids.txt", map(images.name, range(len(images))))
            rows.create()
        if meta is None or meta["sizes"] != sizes or (source and meta["source"] != source):
            # Last: before it is there, nothing of the above is believed.
            write_atomically(folder / "meta.json", lambda path: path.write_text(json.dumps(wanted, indent=2) + "\n"))
        if rows.finished:
            rows.forget()
        elif not rows.partial.exists():
            rows.create()
    distributed.barrier()


def _fill(
    rows: RowFile, batches: np.ndarray, features: Iterator[tuple[Tensor, Tensor]], images: ImageSet, *, done: int
) -> None:
    """Write the features of some batches; `done` images are there already."""
    with rows, progress(len(images), done, "extract") as bar:
        for number, (values, indices) in zip(batches.tolist(), features, strict=True):
            damaged = torch.nonzero(~values.flatten(1).sum(1).isfinite())
            if len(damaged):
                raise ValueError(
                    f"the features of {images.name(int(indices[damaged[0]]))} are not finite: check the weights and that "
                    "image, and use precision fp32"
                )
            rows.write(number, values.numpy())
            bar.update(min(distributed.world_size() * len(values), len(images) - bar.n))


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> str:
    """The settings that differ, as text: `level global -> tokens, model.gamma 2.0 -> None`; empty if none does."""
    found = []
    for name in [*before, *(name for name in now if name not in before)]:
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found.append(_differences(old, new, f"{prefix}{name}."))
        elif old != new:
            found.append(f"{prefix}{name} {str(old)[:24]} -> {str(new)[:24]}")
    return ", ".join(text for text in found if text)


def _check_room(folder: Path, needed: int) -> None:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise ValueError(
            f"the features need {needed / 1e9:.2f} GB, but {folder} has {free / 1e9:.2f} GB left: free some, or give "
            "another --out"
        )


def _write_labels(folder: Path, labels: np.ndarray, classes: Sequence[str]) -> None:
    def save(path: Path) -> None:
        with open(path, "wb") as file:  # numpy would add a suffix to the name
            np.save(file, labels)

    write_atomically(folder / "labels.npy", save)
    _write_names(folder / "classes.txt", classes)


def _write_names(path: Path, names: Iterable[str]) -> None:
    """One name a line; ValueError for a name that has a line break. File names that are not UTF-8 keep their bytes."""
    lines = [f"{name}\n" for name in names]
    if odd := [line for line in lines if "\n" in line[:-1] or "\r" in line]:
        raise ValueError(f"{odd[0][:-1]!r} has a line break in its name, and {path.name} is one name a line: rename it")
    write_atomically(path, lambda file: file.write_bytes("".join(lines).encode("utf-8", "surrogateescape")))
