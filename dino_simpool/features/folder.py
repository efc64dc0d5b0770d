"""The folder that `extract` writes: what its meta.json says, and whether work in it can go on.

A shard is a range of the batches of a set, in a folder of its own. Its meta.json has the settings
of the whole set, and in `shard` which part it is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dino_simpool import distributed
from dino_simpool.features.rows import RowFile, npy_bytes
from dino_simpool.files import Fields, digests_of, file_sha256, read_json, write_atomically, write_json

META: Fields = {
    "settings": dict, "settings.images": dict, "settings.images.names": str, "settings.images.count": int,
    "settings.preprocessing": dict, "settings.model": dict, "settings.batch_size": int, "settings.precision": str, "hash": str,
    "shape": list, "sizes": str, "source": dict, "files?": dict, "shard?": dict, "index?": dict, "made_of?": dict,
}  # fmt: skip


@dataclass(frozen=True)
class Shard:
    """Part `number` of `of`, counted from 1. The parts are disjoint ranges of batches, in order."""

    number: int
    of: int

    @property
    def folder(self) -> str:
        """The name of its folder."""
        return f"shard_{self.number}_of_{self.of}"

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def rows(self, count: int, batch_size: int) -> range:
        """The rows of this part of `count` images. ValueError if there are fewer batches than
        parts."""
        batches = -(-count // batch_size)
        if self.of > batches:
            raise ValueError(
                f"{count:,} images in batches of {batch_size} are {batches:,} batches, too few for {self.of} shards: give at "
                f"most {batches} shards, or a smaller batch_size"
            )
        first, stop = (batches * number // self.of for number in (self.number - 1, self.number))
        return range(first * batch_size, min(stop * batch_size, count))


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


def settings_hash(settings: dict[str, Any]) -> str:
    """SHA-256 of settings in a canonical form."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def sizes_hash(sizes: np.ndarray) -> str:
    """SHA-256 of file sizes (M,) int64: see `ImageSet.sizes`."""
    return hashlib.sha256(sizes.tobytes()).hexdigest()


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> str:
    """The settings that differ: `level global -> tokens, model.gamma 2.0 -> None`, or empty."""
    found = []
    for name in before | now:
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found.append(differences(old, new, f"{prefix}{name}."))
        elif old != new:
            found.append(f"{prefix}{name} {str(old)[:24]} -> {str(new)[:24]}")
    return ", ".join(text for text in found if text)


def add_to_meta(folder: Path, names: Iterable[str], *, of_features: bool = False, **more: Any) -> None:
    """Store the SHA-256 of finished files in the meta.json beside them, and more entries.

    of_features: the files were made of features.npy; see `is_made_of`.
    """
    meta = read_meta(folder)
    assert meta is not None, "written before the rows"
    files = (meta.get("files") or {}) | digests_of(folder, names)
    if of_features and "features.npy" in files:
        more["made_of"] = (meta.get("made_of") or {}) | dict.fromkeys(names, files["features.npy"])
    write_json(folder / "meta.json", meta | {"files": files} | more)


def is_made_of(folder: Path, name: str) -> bool:
    """Whether a file is there, undamaged, and was made of the features.npy beside it."""
    meta = read_meta(folder) or {}
    files, made_of = meta.get("files") or {}, meta.get("made_of") or {}
    same = name in files and name in made_of and made_of[name] == files.get("features.npy")
    return same and (folder / name).is_file() and file_sha256(folder / name) == files[name]


def prepare(
    folder: Path,
    rows: RowFile,
    lines: Iterable[str],
    *,
    settings: dict[str, Any],
    sizes: np.ndarray,
    source: dict[str, Any],
    shard: Shard | None = None,
) -> None:
    """Check on every process that the work can start or resume; then the main process writes
    everything but the rows.

    lines: of ids.txt, read once, and only if it is written.   settings, source: of the whole set,
    for meta.json.   sizes: (rows,) int64, bytes of each image file. ValueError for a folder of
    something else, and for a disk that is too small.
    """
    digest = sizes_hash(sizes)
    part = None if shard is None else dataclasses.asdict(shard)
    meta = read_meta(folder)
    if meta is not None and (different := differences(meta["settings"], json.loads(json.dumps(settings)))):
        raise ValueError(f"{folder} was made with other settings ({different}): give another --out, or those settings")
    if meta is not None and meta.get("shard") != part:
        held, given = (
            "all images" if each is None else "shard {number}/{of}".format(**each) for each in (meta.get("shard"), part)
        )
        raise ValueError(f"{folder} holds {held}, not {given}: give another --out")
    if meta is not None and rows.finished and meta["sizes"] != digest:  # until then, broken files may be repaired
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
            write_lines(folder / "ids.txt", lines)
            rows.create()
        if meta is None or meta["sizes"] != digest or (source and meta["source"] != source):
            record = {"hash": settings_hash(settings), "shape": list(rows.shape), "settings": settings, "files": {}}
            kept = {name: meta[name] for name in ("files", "index", "made_of") if meta is not None and meta.get(name)}
            about: dict[str, Any] = {"sizes": digest, "source": source}
            if part is not None:
                about["shard"] = part
                save_array(folder / "sizes.npy", sizes)  # of all parts, `merge` computes the digest of the whole
            # Last: without it, the files above do not count.
            write_json(folder / "meta.json", record | kept | about)
        if rows.finished:
            rows.forget()
        elif not rows.partial.exists():
            rows.create()
    distributed.barrier()


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a small array as .npy, atomically."""
    write_atomically(path, lambda file: file.write_bytes(npy_bytes(array)))


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write lines, as they come: those of millions of images need not be in memory at once."""

    def write(file: Path) -> None:
        with open(file, "w", encoding="utf-8", newline="\n") as opened:
            opened.writelines(f"{line}\n" for line in lines)

    write_atomically(path, write)
