"""Finds the images most similar to others, with the index of `extract --index`.

The index finds candidates. Their cosines are then computed in float64 and rounded to 1e-6, the
precision of float32 features; of equal ones, the lower row is nearer. With a flat index the result
is exact: if rounding could have hidden a neighbor (many near-ties), all rows are compared instead.
An ivfpq index may miss neighbors; its recall is in the results. The weights must be those of the
index, and queries are prepared as its images were.

M images of the index, Q queries, D width of a feature.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from dino_simpool import distributed
from dino_simpool.checkpoint import load_encoder
from dino_simpool.config import DecodingSettings, Exclude, SearchConfig, from_dict, option_names
from dino_simpool.data import ImageSet, find_images
from dino_simpool.features.encode import Forward, extract_features
from dino_simpool.features.extract import make_transform
from dino_simpool.features.folder import read_meta, sizes_hash
from dino_simpool.features.index import nearest
from dino_simpool.features.rows import StoredRows
from dino_simpool.files import Fields, check_digest, file_sha256, require_fields, write_atomically
from dino_simpool.logs import say
from dino_simpool.models.encoder import Encoder
from dino_simpool.models.weights import weights_sha256
from dino_simpool.names import is_image, shown
from dino_simpool.pictures import Tile, contact_sheet
from dino_simpool.results import write_record

BLUE, GOLD = (31, 119, 180), (230, 159, 0)


def main(cfg: SearchConfig) -> None:
    """The command `dino-simpool search`."""
    device = distributed.setup(cfg.device)
    for name in ("index", "query", "out"):
        if not getattr(cfg, name):
            raise ValueError(f"no {name} is given: give --index DIR --query IMAGE --out OUT, DIR as `extract --index` wrote it")
    meta, features, index = open_index(cfg.index)
    settings = meta["settings"]
    decoding = from_dict(
        DecodingSettings,
        {name: settings["images"][name] for name in option_names(DecodingSettings) if name in settings["images"]}
        | {"max_pixels": meta["source"]["max_pixels"]},
    )
    images, queries = (each.with_decoding(decoding) for each in (images_of(cfg, meta), query_images(cfg.query)))
    forward = Forward(make_transform(settings["preprocessing"]), settings["batch_size"], cfg.workers, settings["precision"])
    vectors = extract_features(encoder_of(cfg, meta).to(device), queries, forward, description="queries")
    if not distributed.is_main():
        return
    found: list[dict[str, Any]] = []
    for number, vector in enumerate(vectors.numpy()):
        ranked = nearest(features, index, vector, k=cfg.k + cfg.exclude_self)
        found.append({"query": queries.name(number), "neighbors": neighbors_of(cfg, queries.path(number), images, *ranked)})
    about = meta.get("index") or {"kind": "flat"}  # version 0.1 had no other
    source = {name: meta["source"][name] for name in ("checkpoint", "sha256", "which")}
    record = {
        "evaluator": "search",
        "dataset": meta["source"]["data"],
        "counts": {"images": len(images), "queries": len(queries)},
        "queries": found,
        "preprocessing": settings["preprocessing"],
        "model": settings["model"] | source,
        "extraction": meta["hash"],
        "index": about,
        "device": device.type,
        "processes": distributed.world_size(),
        "dtype": settings["precision"],
    }
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    write_record(out / "results.json", record, cfg)
    shown = enumerate(found[: cfg.sheet_rows])
    rows = [tiles(queries, i, images, result["neighbors"][: cfg.sheet_columns]) for i, result in shown]
    write_atomically(out / "contact_sheet.png", lambda path: contact_sheet(rows, lines=[1]).save(path, format="PNG"))
    print(describe(found, out))
    if about["kind"] == "ivfpq":
        recall = about["recall@10"][str(about["nprobe"])]
        print(f"approximate: of ten true neighbors, this index finds {10 * recall:.2f} on average (see index in results.json)")


def open_index(folder: str) -> tuple[dict[str, Any], StoredRows, faiss.Index]:
    """meta.json, features (M, D), index of a folder. ValueError if missing or inconsistent."""
    for name in ("meta.json", "features.npy", "index.faiss"):
        if not Path(folder, name).is_file():
            raise ValueError(f"{folder} has no {name}: write it with `extract --index`")
    meta, path = read_meta(folder), Path(folder) / "index.faiss"
    assert meta is not None, "its file exists"
    if not meta["source"]:
        raise ValueError(f"{folder}/meta.json does not say which checkpoint made it: write it with `dino-simpool extract`")
    source: Fields = {"source.checkpoint": str, "source.sha256": str, "source.which": str, "source.data": list}
    source |= {"source.max_pixels": int, "source.exclude?": list}
    remedy = "write it again with `extract --index`"
    require_fields(meta, source, path=f"{folder}/meta.json", what="that of an index", remedy=remedy)
    names = ("features.npy", "ids.txt", path.name)
    notes = [check_digest(Path(folder) / name, meta.get("files"), remedy=remedy) for name in names]
    if notes[0]:
        say(notes[0])
    made_of = (meta.get("made_of") or {}).get(path.name)
    if made_of is not None and made_of != meta["files"]["features.npy"]:
        raise ValueError(f"{path} was not made of the features.npy beside it: {remedy}")
    try:
        features = StoredRows(Path(folder) / "features.npy")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{folder}/features.npy is damaged or no array ({error}): {remedy}") from error
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)  # lists of codes stay on the disk
    except RuntimeError as error:
        raise ValueError(
            f"{path} cannot be read (truncated, or not an index): write it again with `extract --index`"
        ) from error
    if features.shape != (index.ntotal, index.d) or list(features.shape) != meta["shape"]:
        raise ValueError(
            f"{path} holds {index.ntotal} x {index.d} numbers, features.npy {features.shape}, meta.json says {meta['shape']}: "
            f"they do not belong together, {remedy}"
        )
    return meta, features, index


def encoder_of(cfg: SearchConfig, meta: dict[str, Any]) -> Encoder:
    """The encoder of an index. ValueError or OSError if its checkpoint was changed or moved."""
    source = meta["source"]
    if source["checkpoint"].startswith("timm:"):
        weights = cfg.checkpoint or source["weights"]
        encoder = load_encoder(source["checkpoint"], which=source["which"], weights=weights, **meta["settings"]["model"])
        if weights_sha256(encoder) != meta["settings"]["weights"]:
            raise ValueError(
                f"the weights of {source['checkpoint']} are not those of the index: extract again, or give their file"
            )
        return encoder
    path = cfg.checkpoint or source["checkpoint"]
    if not os.path.isfile(path):
        raise FileNotFoundError(f"the checkpoint of the index, {path}, does not exist: give its new place with --checkpoint")
    if (now := file_sha256(path)) != source["sha256"]:
        raise ValueError(
            f"{path} is not the checkpoint that made the index (SHA-256 {now[:12]}, the index has {source['sha256'][:12]}): "
            "extract again, or give the one that made it with --checkpoint"
        )
    return load_encoder(path, which=source["which"], **meta["settings"]["model"])


def images_of(cfg: SearchConfig, meta: dict[str, Any]) -> ImageSet:
    """The images of an index. ValueError or OSError if they were changed, renamed or moved."""
    sources = [cfg.data] if isinstance(cfg.data, str) and cfg.data else list(cfg.data) or meta["source"]["data"]
    try:
        exclude = Exclude(tuple(meta["source"].get("exclude", ())))  # version 0.1 had no such option
        images = find_images([os.path.abspath(source) for source in sources], exclude)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the images of the index: {error}; give their new place with --data") from error
    if images.digest() != meta["settings"]["images"]["names"]:
        count = meta["settings"]["images"]["count"]
        raise ValueError(
            f"{', '.join(sources)} has {len(images)} images, not the {count} of the index, or other names: extract again, "
            "or give their new place with --data"
        )
    if sizes_hash(images.sizes()) != meta["sizes"]:
        raise ValueError(f"{', '.join(sources)} has other files with the names in the index: extract again")
    return images


def query_images(query: str | tuple[str, ...]) -> ImageSet:
    """The queries: the image files named, or the images of a folder or a text file of paths."""
    paths = [query] if isinstance(query, str) else list(query)
    files = [path for path in paths if is_image(path) and not os.path.isdir(path)]
    if not files:
        return find_images(paths)
    if len(files) < len(paths):
        raise ValueError(
            f"query mixes images such as {files[0]} with other sources: give only images, or only folders and lists"
        )
    if missing := [path for path in files if not os.path.isfile(path)]:
        raise FileNotFoundError(f"query {missing[0]} does not exist: give an image, a folder of images or a text file of paths")
    return ImageSet("", np.array(files))


def neighbors_of(
    cfg: SearchConfig, query: str, images: ImageSet, similarities: np.ndarray, rows: np.ndarray
) -> list[dict[str, Any]]:
    """The neighbors of the query at this path in results.json, nearest first."""
    own = os.path.realpath(query)
    found = [
        {
            "name": images.name(row),
            "row": row,
            "similarity": similarity,
            "query_itself": os.path.realpath(images.path(row)) == own,
        }
        for similarity, row in zip(similarities.tolist(), rows.tolist(), strict=True)
    ]
    kept = [neighbor for neighbor in found if not (cfg.exclude_self and neighbor["query_itself"])][: cfg.k]
    return [{"rank": rank, **neighbor} for rank, neighbor in enumerate(kept, 1)]


def tiles(queries: ImageSet, number: int, images: ImageSet, neighbors: list[dict[str, Any]]) -> list[Tile]:
    """A row of the contact sheet: the query in blue, then its neighbors, itself in gold."""
    row = [Tile(queries.read(number), ("query", os.path.basename(queries.name(number))), BLUE)]
    for neighbor in neighbors:
        itself = neighbor["query_itself"]
        caption = f"{neighbor['rank']}.  {neighbor['similarity']:.4f}" + ("  (itself)" if itself else "")
        row.append(Tile(images.read(neighbor["row"]), (caption, neighbor["name"]), GOLD if itself else None))
    return row


def describe(found: list[dict[str, Any]], out: Path) -> str:
    """The text that is printed: for each query, the rank, similarity and name of its neighbors."""
    lines = []
    for result in found:
        lines.append(shown(result["query"]))
        for neighbor in result["neighbors"]:
            itself = "  (the query itself)" if neighbor["query_itself"] else ""
            lines.append(f"  {neighbor['rank']:>3}  {neighbor['similarity']:.4f}  {shown(neighbor['name'])}{itself}")
    return "\n".join([*lines, f"written to {out / 'results.json'} and {out / 'contact_sheet.png'}"])
