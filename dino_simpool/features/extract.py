"""Writes the features of any images to a folder.

    OUT/
        features.npy           float32, one row per image; numpy.load(FILE, mmap_mode="r") maps it
        ids.txt                the name of the image of each row, one per line; as a JSON string if
                               it has characters that a line cannot show (lists.py)
        meta.json              `settings` that determine the numbers, their `hash`, and the `source`
                               of weights and images
        index.faiss            with --index: for `search` (index.py)
        labels.npy             with --labels: int64, the class of each row, and
        classes.txt            the names of the classes, one per line
        features.parquet       with --parquet: id, row, feature

A level is one output of the encoder: `global` (M, D), its feature; `tokens` (M, N, D), what is
pooled; `keys` (M, N, D), SimPool's keys of the tokens (K of eq. 14); `attention` (M, h, w), maps
that sum to 1. Only the index is normalized.

Batch i holds the images from i * batch_size on. One process computes it as a whole, because matrix
products round differently with another number of rows. So the file is the same bit for bit with any
number of workers and processes, and after any number of kills (rows.py). Another batch size changes
the last digits (and min_over="batch" depends on it by definition); another number of threads may
change them too.

A shard (--shard 3/16) is a range of batches in OUT/shard_3_of_16, and --merge puts all of them
together (shards.py), again bit for bit.

M images, N tokens or h x w positions, D width, S side of the square that the encoder sees.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dino_simpool import distributed
from dino_simpool.checkpoint import load_encoder
from dino_simpool.config import ExtractConfig, parse_shard, to_dict
from dino_simpool.data import EvalTransform, ImageSet, class_folder, find_images
from dino_simpool.data.augment import to_tensor
from dino_simpool.data.lists import as_line
from dino_simpool.features.encode import Forward, decoding_of, device_of, encode, preprocessing, try_sizes
from dino_simpool.features.folder import Shard, add_to_meta, is_made_of, prepare, read_meta, save_array, write_lines
from dino_simpool.features.index import build_flat, build_ivfpq
from dino_simpool.features.parquet import require_pyarrow, write_parquet
from dino_simpool.features.rows import RowFile, StoredRows
from dino_simpool.features.shards import merge
from dino_simpool.files import write_atomically
from dino_simpool.logs import progress, say
from dino_simpool.models.encoder import TRAINING, Encoder
from dino_simpool.models.pooling.simpool import SimPool
from dino_simpool.models.weights import weights_sha256
from dino_simpool.names import shown_lines
from dino_simpool.results import origin_of, versions


def main(cfg: ExtractConfig) -> None:
    """The command `dino-simpool extract`."""
    device = distributed.setup(cfg.device)
    if cfg.parquet:
        require_pyarrow()
    folder = Path(cfg.out)
    shard = Shard(*parse_shard(cfg.shard)) if cfg.shard else None
    if shard is not None:
        folder /= shard.folder
    done = (folder / "features.npy").is_file()
    features = merge(cfg.merge, folder) if cfg.merge else _extract(cfg, folder, shard, device)
    if distributed.is_main():
        meta = read_meta(folder)
        assert meta is not None, "written before the features"
        if (cfg.index or cfg.parquet) and meta["settings"]["level"] != "global":
            raise ValueError(f"the shards have level {meta['settings']['level']}: index and parquet are for level global")
        if cfg.index and not (is_made_of(folder, "index.faiss") and (meta.get("index") or {}).get("kind") == cfg.index_kind):
            _write_index(folder, cfg.index_kind)
        if cfg.parquet and not is_made_of(folder, "features.parquet"):
            count, batch_size = meta["settings"]["images"]["count"], meta["settings"]["batch_size"]
            write_parquet(folder, features, first=0 if shard is None else shard.rows(count, batch_size).start)
            add_to_meta(folder, ["features.parquet"], of_features=True)
        shape, level, source = " x ".join(map(str, features.shape)), meta["settings"]["level"], meta["source"]
        part = "" if shard is None else f"shard {shard}, "
        how = "already complete, with these settings and files, in" if done else "written to"
        what = f"extract: {part}{level}, {shape}, {source['which']} of {cfg.checkpoint or source['checkpoint']}"
        print(shown_lines(f"{what}\n  {how} {folder / 'features.npy'}"))
    distributed.barrier()


def _write_index(folder: Path, kind: str) -> None:
    """Write index.faiss, and what it is to meta.json."""
    rows = StoredRows(folder / "features.npy")
    about: dict[str, Any] = {"kind": kind}
    index: faiss.Index
    if kind == "flat":
        index = build_flat(rows)
    else:
        index, about = build_ivfpq(rows)
        recall, lists = about["recall@10"][str(about["nprobe"])], f"{about['nprobe']} of {about['lists']:,} lists"
        say(f"index: recall@10 is {recall:.3f} (1 is exact search), with {lists} read for a query")
    write_atomically(folder / "index.faiss", partial(_save_index, index))
    add_to_meta(folder, ["index.faiss"], of_features=True, index=about)


def _save_index(index: faiss.Index, path: Path) -> None:
    """Write an index through Python: faiss itself does not raise if the last bytes find no room."""
    with open(path, "wb") as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))  # type: ignore[attr-defined]


def _extract(cfg: ExtractConfig, folder: Path, shard: Shard | None, device: torch.device) -> np.ndarray:
    """The features of all images, or of a shard of them, and their labels."""
    for name in ("checkpoint", "data", "out"):
        if not getattr(cfg, name):
            raise ValueError(f"no {name} is given: give --checkpoint RUN/last.pth --data IMAGES --out OUT")
    sources = [os.path.abspath(source) for source in ([cfg.data] if isinstance(cfg.data, str) else cfg.data)]
    if cfg.labels and len(sources) > 1:
        raise ValueError(f"labels need one folder of class folders, given {len(sources)} sources: leave labels out")
    images = class_folder(sources[0], cfg.excluded) if cfg.labels else find_images(sources, cfg.excluded)
    encoder = load_encoder(cfg.checkpoint, which=cfg.which, weights=cfg.weights, min_over=cfg.min_over, **cfg.model).to(device)
    images = images.with_decoding(decoding_of(cfg, encoder, images))
    view = {"view": cfg.view, **preprocessing(encoder.config, image_size=cfg.image_size, resize=cfg.resize)}
    if cfg.view == "whole":
        del view["resize"]
    source = {
        **origin_of(encoder, cfg.checkpoint, cfg.weights),
        "which": cfg.which,
        "data": [images.root] if cfg.labels else sources,
        "max_pixels": cfg.max_pixels,
        "exclude": list(cfg.exclude),
        "training": {name: getattr(encoder, name) for name in TRAINING},
    }
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
        shard=shard,
    )
    if distributed.is_main() and images.labels is not None:
        rows = rows_of(shard, images, cfg.batch_size)
        save_array(folder / "labels.npy", images.labels[rows.start : rows.stop])
        write_lines(folder / "classes.txt", map(as_line, images.classes))
        add_to_meta(folder, ["labels.npy", "classes.txt"])
    return features


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
    shard: Shard | None = None,
) -> np.ndarray:
    """Write features.npy, ids.txt and meta.json to `out` and return the features (M, ...), float32,
    mapped from the file. Features that `out` already holds with the same settings are kept and
    completed. All processes call it together.

    batch_size, workers, precision: as in `Forward`. view: the argument of `make_transform`, None
    for that of the model. source: written to meta.json; `search` needs checkpoint, sha256, which,
    data and max_pixels. The last one is kept: it does not change the numbers, only whether there
    are any. shard: only these batches, with `out` as a folder of their own. ValueError or OSError,
    before anything is computed, if the level or the size does not suit the encoder, if the disk is
    too small, if there are fewer batches than shards, or if `out` was made with other settings,
    which are named. Later for a broken image or features that are not finite.
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
    part = rows_of(shard, images, batch_size)
    shape = (len(part), *blank.shape[1:])
    rows = RowFile(Path(out, "features.npy"), shape, block=batch_size, rank=distributed.rank())
    sizes = images.sizes(slice(part.start, part.stop))
    lines = (as_line(images.name(row)) for row in part)
    prepare(Path(out), rows, lines, settings=settings, sizes=sizes, source=source or {}, shard=shard)
    computed = not rows.finished
    if computed:
        missing = rows.remaining()
        distributed.barrier()  # no process writes the progress until all have read it
        mine = np.array_split(missing, distributed.world_size())[distributed.rank()]
        forward = Forward(make_transform(view), batch_size, workers, precision)
        batches = forward.batches(images, part.start + rows.rows_of(mine), device)
        with rows, progress(len(part), len(part) - len(rows.rows_of(missing)), "extract") as bar:
            for number, (batch, indices) in zip(mine.tolist(), batches, strict=True):
                values = encode(encoder, batch, precision=precision, method=method).cpu()
                _require_finite(values, images, indices)
                rows.write(number, values.numpy())
                bar.update(min(distributed.world_size() * len(values), len(part) - bar.n))
        distributed.barrier()
        if distributed.is_main():
            rows.finish()
        distributed.barrier()
    meta = read_meta(out)
    if distributed.is_main() and meta is not None and (computed or not meta.get("files")):
        add_to_meta(Path(out), ["features.npy", "ids.txt"])
    finished: np.ndarray = np.load(rows.path, mmap_mode="r")
    return finished


def rows_of(shard: Shard | None, images: ImageSet, batch_size: int) -> range:
    """The rows of a shard, or all."""
    return range(len(images)) if shard is None else shard.rows(len(images), batch_size)


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


def _require_finite(values: Tensor, images: ImageSet, indices: Tensor) -> None:
    if not_finite := indices[~values.flatten(1).sum(1).isfinite()].tolist():
        name = images.name(not_finite[0])
        raise ValueError(f"the features of {name} are not finite: check the weights and that image, and use precision fp32")
