"""Features that `extract` wrote, for evaluators: checked, mapped, and found by the names of images.

They are mapped from the file and read where they are used. So a process holds no copy of them, and
the system may drop from its memory what was read.

M images of the set, D width of a feature.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dino_simpool.config import to_dict
from dino_simpool.data import ImageSet
from dino_simpool.data.index import Index, Strings
from dino_simpool.features.folder import differences, read_meta, sizes_hash
from dino_simpool.files import check_digest, file_sha256
from dino_simpool.logs import say
from dino_simpool.models.encoder import TRAINING, Encoder
from dino_simpool.models.weights import weights_sha256

_AGAIN = "extract again"


@dataclass(frozen=True, eq=False)
class StoredFeatures:
    """The features in a folder, and what its meta.json says of them."""

    folder: Path
    rows: Tensor
    """(M, D) float32 or float16 on the CPU, mapped and not to be written to."""
    names: Strings
    """(M) names of the images, those in ids.txt."""
    meta: dict[str, Any]
    sha256: str
    """Of features.npy."""

    @classmethod
    def open(cls, folder: str | Path) -> StoredFeatures:
        """Map the features in a folder. ValueError if they are not those that its meta.json
        describes, are of another level than global, not finished, or a shard."""
        folder = Path(folder)
        meta = read_meta(folder)
        if (meta is None and any(folder.glob("shard_*_of_*"))) or (meta is not None and meta.get("shard")):
            raise ValueError(f"{folder} holds shards: put them together first, with dino-simpool extract --merge")
        if meta is None:
            raise ValueError(f"{folder} holds no features (there is no meta.json): give a folder that `extract` wrote")
        if meta["settings"]["level"] != "global":
            raise ValueError(
                f"{folder} has level {meta['settings']['level']}: extract level global, one feature for each image"
            )
        path = folder / "features.npy"
        if not path.is_file():
            raise ValueError(f"{folder} is not finished: run the same `extract` again to complete it")
        if note := check_digest(path, meta.get("files"), remedy=_AGAIN):
            say(note)
        try:
            array = np.load(path, mmap_mode="r")
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} cannot be read ({error}): {_AGAIN}") from error
        if list(array.shape) != meta["shape"] or array.dtype not in (np.float32, np.float16) or not array.flags.c_contiguous:
            expected = " x ".join(map(str, meta["shape"]))
            raise ValueError(
                f"{path} holds {array.dtype} {array.shape} and not {expected} numbers of float32 or float16: {_AGAIN}"
            )
        with warnings.catch_warnings():  # the map can only be read, and nobody writes to features
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            rows = torch.from_numpy(array)
        names = Strings.of(_read_ids(folder / "ids.txt"))
        if Index(names).digest() != meta["settings"]["images"]["names"] or len(names) != len(rows):
            raise ValueError(
                f"{folder / 'ids.txt'} is damaged or was changed: it does not match the names in meta.json; {_AGAIN}"
            )
        return cls(folder, rows, names, meta, (meta.get("files") or {}).get(path.name) or file_sha256(path))

    @property
    def decoding(self) -> dict[str, Any]:
        """How the images were decoded."""
        images: dict[str, Any] = self.meta["settings"]["images"]
        limit = {"max_pixels": self.meta["source"].get("max_pixels")}
        return limit | {name: value for name, value in images.items() if name not in ("count", "names")}

    def record(self) -> dict[str, Any]:
        """Where the features come from, for a result."""
        about = {name: self.meta[name] for name in ("settings", "source")}
        return {"folder": str(self.folder), "sha256": self.sha256, "count": len(self.rows), **about}

    def model(self) -> dict[str, Any]:
        """The encoder that made them, as `results.model_record` has it; None for what was not
        stored."""
        settings, source = self.meta["settings"], self.meta["source"]
        told = {name: source.get(name) for name in ("checkpoint", "sha256", "which")}
        told |= {name: source[name] for name in ("weights",) if name in source}  # the file of timm:NAME
        training = source.get("training") or dict.fromkeys(TRAINING)
        return settings["model"] | told | training | {"weights_sha256": settings["weights"], "decoding": self.decoding}

    def require_encoder(self, encoder: Encoder, checkpoint: str) -> None:
        """ValueError unless these are features of this encoder."""
        settings = self.meta["settings"]
        now = {name: value for name, value in to_dict(encoder.config).items() if name in settings["model"]}
        different = differences(
            {"model": settings["model"], "weights": settings["weights"]}, {"model": now, "weights": weights_sha256(encoder)}
        )
        if different:
            raise ValueError(f"{self.folder} has no features of {checkpoint} ({different}): leave checkpoint out, or {_AGAIN}")

    def require_same_way(self, other: StoredFeatures) -> None:
        """ValueError unless other features were made by the same encoder from images that were
        prepared in the same way. Batches and machines may differ."""
        mine, its = (
            {name: each.meta["settings"][name] for name in ("model", "weights", "preprocessing", "precision")}
            | {"images": each.decoding | {"max_pixels": None}}  # which changes no number
            for each in (self, other)
        )
        if different := differences(mine, its):
            raise ValueError(
                f"{self.folder} and {other.folder} were made in different ways ({different}): extract one of them again"
            )

    def labeled(self, part: str = "") -> ImageSet:
        """The images below a folder of the set, or all, as a class folder has them, without their
        files. ValueError if there are none, or some are in no class folder."""
        prefix, names = "", list(self.names)
        if part:
            part = part.rstrip("/")
            prefixes = (f"{part}/", f"{part}.tar/", f"{part}.zip/")
            prefix = next((each for each in prefixes if any(name.startswith(each) for name in names)), "")
            if not prefix:
                raise ValueError(
                    f"{self.folder} has no images of {part}/, it has {names[0]}: extract a folder that holds {part}/, or "
                    f"{part}/ to {self.folder / part}"
                )
            names = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        folders = [name.partition("/")[0] if "/" in name else "" for name in names]
        if "" in folders:
            raise ValueError(
                f"{names[folders.index('')]} in {self.folder / 'ids.txt'} is in no class folder: extract DIR/CLASS/IMAGE"
            )
        classes = sorted(set(folders))
        number = {name: i for i, name in enumerate(classes)}
        labels = np.array([number[name] for name in folders], np.int64)
        order = labels.argsort(kind="stable")  # of nested folders, those of one class need not be adjacent
        return ImageSet(str(self.folder / prefix), [names[row] for row in order.tolist()], labels[order], tuple(classes))

    def of(self, images: ImageSet, *, files: bool) -> Tensor:
        """The features (n, D) of these images, a part of the map if they follow each other there.

        An image is found by its name below the root of its set, or by that with the last folders of
        the root before it. files: the files of the images are there; if the features are of no
        others, the sizes of the files are compared too. ValueError names an image without features.
        """
        content = b"\n" + self.names.data.tobytes()
        there = (prefix for prefix in _ends(images.root) if b"\n" + _line(prefix + images.name(0)) in content)
        if (prefix := next(there, None)) is None:
            raise ValueError(f"{self.folder} has no features of {images.path(0)}: {_AGAIN}, or give the data that it is of")
        names = Strings.of(f"{prefix}{name}" for name in images.index.names)
        place = content.find(b"\n" + names.data.tobytes())  # all of them, one after another
        first = int(np.searchsorted(self.names.starts, place))
        rows = slice(first, first + len(names))
        if place < 0 or not np.array_equal(self.names.starts[first : rows.stop + 1] - place, names.starts):
            number = {name: row for row, name in enumerate(self.names)}
            if missing := [name for name in names if name not in number]:
                raise ValueError(
                    f"{self.folder} has no features of {len(missing)} of {len(names)} images of {images.root}, such as "
                    f"{missing[0]}: extract them too, or give the data that it is of"
                )
            return self.rows[torch.tensor([number[name] for name in names])]
        if len(names) == len(self.names) and files and sizes_hash(images.sizes()) != self.meta["sizes"]:
            raise ValueError(f"{images.root} has other files with the names in {self.folder / 'ids.txt'}: {_AGAIN}")
        return self.rows[rows]


def _line(name: str) -> bytes:
    """A name as `Strings` holds it."""
    return f"{name}\n".encode("utf-8", "surrogateescape")


def _ends(root: str) -> Iterator[str]:
    """The path of a folder, then ever shorter ends of it, each with a slash after it; then ""."""
    parts = os.path.abspath(root).replace(os.sep, "/").split("/")
    return ("".join(f"{part}/" for part in parts[first:]) for first in range(len(parts) + 1))


def _read_ids(path: Path) -> Iterator[str]:
    """The names in ids.txt, which `data.lists.as_line` wrote."""
    with open(path, encoding="utf-8", newline="\n") as file:
        for line in file:
            text = line.removesuffix("\n")
            yield json.loads(text) if text.startswith('"') else text
