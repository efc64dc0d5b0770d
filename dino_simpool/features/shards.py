"""Puts the shards of a set, which `extract --shard` wrote on any machines, together.

The result is the same bit for bit as that of `extract` without shards. A merge that was stopped
goes on where it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from dino_simpool import distributed
from dino_simpool.features.folder import (
    Shard,
    add_to_meta,
    differences,
    prepare,
    read_meta,
    save_array,
    sizes_hash,
    write_lines,
)
from dino_simpool.features.rows import RowFile, StoredRows
from dino_simpool.files import check_digest
from dino_simpool.logs import progress, say

Found = tuple[Shard, Path, dict[str, Any]]
"""A shard, its folder and its meta.json."""
_REMEDY = "remove this folder and extract that shard again"


def merge(folders: str | Sequence[str], out: Path) -> np.ndarray:
    """Write features.npy, ids.txt and meta.json to `out`, and labels.npy and classes.txt if the
    shards have them. Returns the features, mapped from the file.

    folders: shards, or folders of shards, in any order. ValueError, before anything is written, if
    shards are missing, unfinished or there twice, or are not of the same images, model and
    settings; later if the features of one are damaged.
    """
    if distributed.world_size() > 1:
        raise ValueError(f"merge runs in one process, given {distributed.world_size()}: start it without torchrun or srun -n")
    found = find([folders] if isinstance(folders, str) else folders)
    _, _, first = found[0]
    settings, batch_size = first["settings"], first["settings"]["batch_size"]
    for _, path, _ in found:
        _check(path, "ids.txt")
    rows = RowFile(out / "features.npy", (settings["images"]["count"], *first["shape"][1:]), block=batch_size)
    sizes = np.concatenate([_sizes(path, meta) for _, path, meta in found])
    prepare(out, rows, _lines(found), settings=settings, sizes=sizes, source=first["source"])
    if not rows.finished:
        with rows, progress(rows.shape[0], 0, "merge") as bar:
            missing = rows.remaining()
            for shard, path, _ in found:
                _check(path, "features.npy")
                part = shard.rows(rows.shape[0], batch_size)
                stored = StoredRows(path / "features.npy")
                for block in missing[(missing * batch_size >= part.start) & (missing * batch_size < part.stop)].tolist():
                    start = block * batch_size - part.start
                    rows.write(block, stored[start : start + batch_size])
                bar.update(len(part))
        rows.finish()
        add_to_meta(out, ["features.npy", "ids.txt"])
    _merge_labels(found, out)
    finished: np.ndarray = np.load(rows.path, mmap_mode="r")
    return finished


def find(folders: Sequence[str]) -> list[Found]:
    """The shards in these folders, in order. ValueError unless each is there once, is finished, and
    is of the same set."""
    found: list[Found] = []
    for folder in map(Path, folders):
        # A folder of shards may also hold the result of an earlier merge.
        for path in [*folder.glob("shard_*_of_*")] or [folder]:
            meta = read_meta(path)
            if meta is not None and meta.get("shard"):
                found.append((Shard(**meta["shard"]), path, meta))
            elif path == folder:
                raise ValueError(f"{folder} holds no shards: give folders that `extract --shard` wrote, or one that holds them")
    found.sort(key=lambda entry: (entry[0].number, str(entry[1])))
    if not found:
        raise ValueError(f"{', '.join(folders)} has only shards that were not begun: run `extract --shard` first")
    _require_same_set(found)
    done = [entry for entry in found if (entry[1] / "features.npy").is_file()]
    for shard, copies in groupby(done, key=lambda entry: entry[0]):
        if len(twice := [str(path) for _, path, _ in copies]) > 1:
            raise ValueError(f"shard {shard} is there twice, {' and '.join(twice)}: give one of them")
    of, there = found[0][0].of, {shard.number for shard, _, _ in done}
    begun = {shard.number for shard, _, _ in found} - there
    if missing := sorted(set(range(1, of + 1)) - there):
        named = ", ".join(f"{n}/{of}" + (" (begun)" if n in begun else "") for n in missing[:20])
        more = f" and {len(missing) - 20} more" if len(missing) > 20 else ""
        raise ValueError(f"{len(missing)} of {of} shards are not finished: {named}{more}; run `extract --shard` for these")
    return done


def _require_same_set(found: Sequence[Found]) -> None:
    shard, path, first = found[0]
    for other, there, meta in found[1:]:
        different = differences(first["settings"], meta["settings"])
        if other.of != shard.of:
            different = different or f"shards {shard.of} -> {other.of}"
        if different:
            raise ValueError(f"{path} and {there} are not shards of the same set ({different}): give shards of one set")


def _sizes(path: Path, meta: dict[str, Any]) -> np.ndarray:
    try:
        sizes: np.ndarray = np.load(path / "sizes.npy")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path / 'sizes.npy'} cannot be read ({error}): {_REMEDY}") from error
    if sizes_hash(sizes) != meta["sizes"] or len(sizes) != meta["shape"][0]:
        raise ValueError(f"{path / 'sizes.npy'} is not of the shard beside it: {_REMEDY}")
    return sizes


def _check(path: Path, name: str) -> None:
    """ValueError unless a file of a shard is the one that was written."""
    meta = read_meta(path)
    if note := check_digest(path / name, meta and meta.get("files"), remedy=_REMEDY):
        say(note)


def _lines(found: Sequence[Found]) -> Iterator[str]:
    for _, path, meta in found:
        with open(path / "ids.txt", encoding="utf-8", newline="\n") as file:
            count = 0
            for line in file:
                yield line.removesuffix("\n")
                count += 1
        if count != meta["shape"][0]:
            raise ValueError(f"{path / 'ids.txt'} has {count:,} names for {meta['shape'][0]:,} rows: {_REMEDY}")


def _merge_labels(found: Sequence[Found], out: Path) -> None:
    labeled = [path for _, path, _ in found if (path / "labels.npy").is_file()]
    if not labeled:
        return
    if len(labeled) < len(found):
        without = next(path for _, path, _ in found if path not in labeled)
        raise ValueError(
            f"{labeled[0]} has labels and {without} has none: run `extract --shard` with --labels for all, or none"
        )
    classes = {(path / "classes.txt").read_text(encoding="utf-8") for path in labeled}
    if len(classes) > 1:
        raise ValueError(f"the shards in {labeled[0].parent} have different classes.txt: extract their labels again")
    save_array(out / "labels.npy", np.concatenate([np.load(path / "labels.npy") for path in labeled]))
    write_lines(out / "classes.txt", classes.pop().splitlines())
    add_to_meta(out, ["labels.npy", "classes.txt"])
